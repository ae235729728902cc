"""Trials: what is played, summed up and compared, without a model."""

from __future__ import annotations

import json
import math
import random

import numpy as np
import pytest

from dsasr.evaluation import suite_results
from dsasr.evaluation.eval_sets import Recording
from dsasr.evaluation.suite import SuiteConfig
from dsasr.evaluation.suite_results import Trial, Trials, compare, sign_test
from dsasr.utils.errors import UserError


def recording(key, text):
    wave = np.random.default_rng(len(key)).normal(0, 0.1, 8000).astype(np.float32)
    return Recording(key, wave, text, "en", "s")


def test_cases_of_speech_and_of_recordings_without_text():
    held = [recording("a", "the cat"), recording("bb", "")]
    assert [(c.key, c.condition, c.text) for c in suite_results.cases(held)] == [
        ("a", "clean", "the cat"),
        ("bb", "recorded", None),
    ]
    config = SuiteConfig(clips=1, seconds=0.5)
    found = [c.condition for c in suite_results.cases(held, config)]
    made = ["silence", "white", "babble", "music"]
    assert found == [*made, "clean", "snr20", "snr10", "snr5", "snr0", "cut50", "recorded"]
    # Babble is made of speech.
    alone = [c.condition for c in suite_results.cases(held[1:], config)]
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
    assert suite_results.read(path).rows == ROWS
    path.write_text("{}\n")
    with pytest.raises(UserError, match="transcripts"):
        suite_results.read(path)


def test_paired_comparison_is_by_condition():
    better = [row(r.key, r.reference, r.reference or "", r.condition) for r in ROWS]
    found = compare(Trials(ROWS), Trials(better))
    assert found["clean"]["difference"] == pytest.approx(-1 / 6)
    assert found["snr0"]["flagged_a"] == 1 and found["snr0"]["flagged_b"] == 0
    assert found["recorded"]["flagged_p"] == 1.0 and "difference" not in found["cut50"]
    assert "characters_difference" not in found["clean"]
    with pytest.raises(UserError, match="other cases"):
        compare(Trials(ROWS), Trials(better[1:]))
    with pytest.raises(UserError, match="the same keys"):
        compare(Trials([*ROWS, ROWS[0]]), Trials([*better, better[0]]))


def test_paired_comparison_of_characters_a_minute():
    """Two systems that write on all clips: any text or none cannot tell them apart."""
    rng = np.random.default_rng(0)
    sizes = rng.integers(20, 60, 40)
    one = [
        row(f"n{i}", None, "x" * k, ("white", "music")[i % 2], 30.0) for i, k in enumerate(sizes)
    ]
    two = [
        Trial(**{**vars(r), "hypothesis": r.hypothesis[: -8 - i % 5]}) for i, r in enumerate(one)
    ]
    quiet = [row(f"s{i}", None, "…", "silence", 60.0) for i in range(3)]
    alone = [row("r", None, "hello", "recorded", 60.0)]
    a, b = Trials([*ROWS[:2], *one, *quiet, *alone]), Trials([*ROWS[:2], *two, *quiet, *alone])
    found = compare(a, b)
    assert list(found) == ["clean", "white", "music", "silence", "recorded", "nonspeech"]
    white, over = found["white"], found["nonspeech"]
    assert white["flagged_a"] == white["flagged_b"] == 20 and white["flagged_p"] == 1
    # From 8 to 12 characters fewer in half a minute, 10 in the mean: −20 ± 1.96 · 2√2 / √20.
    assert white["characters_difference"] == pytest.approx(-20)
    half = 1.96 * 2 * math.sqrt(2 / 20)
    assert white["characters_low"] == pytest.approx(-20 - half, abs=0.3)
    assert white["characters_high"] == pytest.approx(-20 + half, abs=0.3)
    assert white["characters_p_value"] < 0.01 and white["characters_improved"] == 1
    assert over["utterances"] == 44 and over["characters_difference"] == pytest.approx(-400 / 24)
    assert over["characters_low"] < -400 / 24 < over["characters_high"] < 0
    # Neither wrote any text, or a single clip was heard: no interval.
    silence, recorded = found["silence"], found["recorded"]
    assert silence["characters_difference"] == 0 and silence["characters_p_value"] == 1
    for part in (silence, recorded):
        assert math.isnan(part["characters_low"]) and math.isnan(part["characters_high"])
    assert math.isnan(recorded["characters_p_value"])
    back = compare(b, a)["white"]
    assert back["characters_difference"] == pytest.approx(20) and back["characters_improved"] == 0
    assert not any(name.startswith("characters") for name in found["clean"])


def test_words_heard_wrongly_before_a_cut_are_not_invented():
    text = "turn on the kitchen light and close the bedroom window"
    assert not suite_results.flagged(row("a", text, "burn in a chicken fight", "cut50"))
    # What goes on to the end as the sentence does passes; another end and another sentence do not.
    assert not suite_results.flagged(row("a", text, text, "cut50"))
    for made in (
        "turn on the kitchen light then we all went home again last night",
        "yesterday some old friends met near my new harbour house",
    ):
        assert suite_results.flagged(row("a", text, made, "cut50"))


@pytest.mark.parametrize("rate", [0.4, 0.7, 1.0])
def test_substitutions_before_a_cut_are_not_flagged(rate):
    """Utterances whose first half was heard with other words in the place of words, no more."""
    rng = random.Random(0)
    words = [f"w{i}" for i in range(500)]
    for _ in range(100):
        said = rng.choices(words, k=rng.randint(6, 16))
        half = said[: round(0.5 * len(said))]
        heard = [rng.choice(words) if rng.random() < rate else word for word in half]
        assert not suite_results.flagged(row("a", " ".join(said), " ".join(heard), "cut50"))
        made = [*half, *(f"m{i}" for i in range(8))]
        assert suite_results.flagged(row("a", " ".join(said), " ".join(made), "cut50"))


@pytest.mark.parametrize(
    ("text", "said"), [("", False), ("。 …", False), ("oh。", True), ("[music]", True)]
)
def test_text_on_nonspeech_is_words_not_punctuation(text, said):
    row = Trial(**{**vars(ROWS[0]), "reference": None, "hypothesis": text})
    assert suite_results.flagged(row) is said


def test_sign_test_against_the_binomial():
    assert sign_test(0, 0) == 1.0 and sign_test(3, 3) == 1.0
    assert sign_test(0, 5) == pytest.approx(2 / 32)
    assert sign_test(1, 7) == sign_test(7, 1) == pytest.approx(2 * (1 + 8) / 256)
    assert math.isclose(sign_test(2, 4), 2 * (1 + 6 + 15) / 64)
