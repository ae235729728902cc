"""Trials: what is played, summed up and compared, without a model."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from dsasr.errors import UserError
from dsasr.evaluation import trials
from dsasr.evaluation.noise import SuiteConfig
from dsasr.evaluation.recordings import Recording
from dsasr.evaluation.trials import Trial, Trials, compare, sign_test


def recording(key, text):
    wave = np.random.default_rng(len(key)).normal(0, 0.1, 8000).astype(np.float32)
    return Recording(key, wave, text, "en", "s")


def test_cases_of_speech_and_of_recordings_without_text():
    held = [recording("a", "the cat"), recording("bb", "")]
    assert [(c.key, c.condition, c.text) for c in trials.cases(held)] == [
        ("a", "clean", "the cat"),
        ("bb", "recorded", None),
    ]
    config = SuiteConfig(clips=1, seconds=0.5)
    found = [c.condition for c in trials.cases(held, config)]
    made = ["silence", "white", "babble", "music"]
    assert found == [*made, "clean", "snr20", "snr10", "snr5", "snr0", "cut50", "recorded"]
    # Babble is made of speech.
    alone = [c.condition for c in trials.cases(held[1:], config)]
    assert alone == ["silence", "white", "music", "recorded"]


def row(key, reference, hypothesis, condition="clean", seconds=2.0, lang="en"):
    return Trial(key, condition, lang, reference, hypothesis, seconds, 0.1, True)


ROWS = [
    row("a", "the cat sat", "the cat sat"),
    row("b", "the cat sat", "the cap sat"),
    row("a", "the cat sat", "the", "cut50"),
    row("a", "the cat sat", "a b c d e f g h i j", "snr0"),
    row("x", None, "hello", "recorded"),
    row("y", None, "", "recorded"),
]


def test_summary_by_condition_and_language():
    found = Trials(ROWS).summary()
    clean = found["conditions"]["clean"]
    assert clean["rate"] == pytest.approx(1 / 6) and clean["substitutions"] == 1
    assert clean["low"] <= clean["rate"] <= clean["high"]
    assert clean["languages"]["en"]["unit"] == "word"
    assert "cut50" not in found["conditions"] and found["conditions"]["snr0"]["rate"] > 1
    rows = {r["condition"]: r for r in found["hallucination"]["rows"]}
    assert rows["clean"]["flagged"] == 0 and rows["snr0"]["invented"] == 1
    # A cut transcript is judged against the part that it may have heard.
    assert rows["cut50"]["flagged"] == 0
    assert rows["recorded"]["characters_per_minute"] == pytest.approx(60 * 5 / 4)
    assert rows["recorded"]["clips_with_text"] == 1 and rows["recorded"]["rate"] is None
    json.dumps(found, allow_nan=False)


def test_a_reference_without_a_unit_has_no_rate():
    """Insertions into nothing: an infinite share, which JSON has no word for."""
    held = [row("a", "Um, uh.", "hello there"), row("b", "?!", "")]
    clean = Trials(held).summary()["conditions"]["clean"]
    assert clean["units"] == 0 and clean["insertions"] == 2
    for part in (clean, clean["languages"]["en"]):
        assert [part[k] for k in ("rate", "low", "high")] == [None] * 3
    assert "difference" not in compare(Trials(held), Trials(held))["clean"]
    broken = [Trial(**{**vars(held[0]), "entropy": math.nan})]
    assert json.loads(Trials(broken).text())["entropy"] is None


def test_characters_a_minute_have_an_interval_over_clips():
    clips = [row(f"n{i}", None, "x" * i, "white", 30.0) for i in range(10)]
    clips += [row("s0", None, "", "silence", 60.0), row("s1", None, "…", "silence", 60.0)]
    clips += [row("r", None, "hello", "recorded")]
    found = Trials([*clips, *ROWS[:2]]).summary()["hallucination"]["nonspeech"]
    assert list(found) == ["white", "silence", "recorded", "all"]
    white, silence = found["white"], found["silence"]
    assert white["rate"] == pytest.approx(45 / 5)
    # The mean of 10 clips of s.d. √8.25 characters in half a minute, in percentiles.
    half = 1.96 * 2 * math.sqrt(8.25 / 10)
    assert white["low"] == pytest.approx(9 - half, abs=0.5)
    assert white["high"] == pytest.approx(9 + half, abs=0.5)
    assert (white["clips"], white["clips_with_text"]) == (10, 9)
    # Clips without any text do not show that there is never any.
    assert silence == {
        "rate": 0.0, "low": None, "high": None, "clips": 2, "clips_with_text": 0
    }  # fmt: skip
    assert found["recorded"]["rate"] == 150 and found["recorded"]["low"] is None
    assert found["all"]["rate"] == pytest.approx(50 / (5 + 2 + 2 / 60))
    assert found["all"]["clips"] == 13 and found["all"]["low"] < found["all"]["high"]
    assert Trials(ROWS[:2]).summary()["hallucination"]["nonspeech"] == {}


def test_rows_survive_their_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(Trials(ROWS).text())
    assert trials.read(path).rows == ROWS
    path.write_text("{}\n")
    with pytest.raises(UserError, match="transcripts"):
        trials.read(path)


def test_paired_comparison_is_by_condition():
    better = [row(r.key, r.reference, r.reference or "", r.condition) for r in ROWS]
    found = compare(Trials(ROWS), Trials(better))
    assert found["clean"]["difference"] == pytest.approx(-1 / 6)
    assert found["snr0"]["flagged_a"] == 1 and found["snr0"]["flagged_b"] == 0
    assert found["recorded"]["flagged_p"] == 1.0 and "difference" not in found["cut50"]
    with pytest.raises(UserError, match="other cases"):
        compare(Trials(ROWS), Trials(better[1:]))
    with pytest.raises(UserError, match="the same keys"):
        compare(Trials([*ROWS, ROWS[0]]), Trials([*better, better[0]]))


@pytest.mark.parametrize(("text", "said"), [("", False), ("。 …", False), ("oh。", True)])
def test_text_on_nonspeech_is_words_not_punctuation(text, said):
    row = Trial(**{**vars(ROWS[0]), "reference": None, "hypothesis": text})
    assert trials.flagged(row) is said


def test_sign_test_against_the_binomial():
    assert sign_test(0, 0) == 1.0 and sign_test(3, 3) == 1.0
    assert sign_test(0, 5) == pytest.approx(2 / 32)
    assert sign_test(1, 7) == sign_test(7, 1) == pytest.approx(2 * (1 + 8) / 256)
    assert math.isclose(sign_test(2, 4), 2 * (1 + 6 + 15) / 64)
