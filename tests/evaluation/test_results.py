"""Results: summaries and paired comparisons of transcripts, without a model."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace

import numpy as np
import pytest

from dsasr.evaluation.results import Result, Results, compare, read_results, sign_test
from dsasr.evaluation.results_text import format_results
from dsasr.utils.errors import UserError
from dsasr.utils.troubleshooting import see


def row(key, reference, hypothesis, condition="clean", seconds=2.0, lang="en"):
    return Result(key, condition, lang, reference, hypothesis, seconds, 0.1, True)


ROWS = [
    row("a", "the cat sat", "the cat sat"),
    row("b", "the cat sat", "the cap sat"),
    row("a", "the cat sat", "the", "cut50"),
    row("a", "the cat sat", "a b c d e f g h i j", "snr0"),
    row("x", None, "hello", "recorded"),
    row("y", None, "", "recorded"),
]


def test_summary_by_condition_and_language():
    summary = Results(ROWS).summary()
    clean = summary["conditions"]["clean"]
    assert clean["rate"] == pytest.approx(1 / 6) and clean["substitutions"] == 1
    assert clean["low"] <= clean["rate"] <= clean["high"]
    assert clean["languages"]["en"]["unit"] == "word"
    assert "cut50" not in summary["conditions"] and summary["conditions"]["snr0"]["rate"] > 1
    rows = {r["condition"]: r for r in summary["hallucination"]["rows"]}
    assert rows["clean"]["flagged"] == 0 and rows["snr0"]["invented"] == 1
    # A transcript of truncated speech is judged against the part that may have been spoken.
    assert rows["cut50"]["flagged"] == 0
    assert rows["recorded"]["characters_per_minute"] == pytest.approx(60 * 5 / 4)
    assert rows["recorded"]["clips_with_text"] == 1 and rows["recorded"]["rate"] is None
    json.dumps(summary, allow_nan=False)


def test_transcripts_cut_at_the_token_limit_are_counted():
    rows = [replace(ROWS[0], finished=False), ROWS[1], replace(ROWS[4], finished=False), ROWS[5]]
    summary = Results(rows).summary()
    assert summary["cut"] == {"clean": 1, "recorded": 1}
    (line,) = [x for x in format_results(Results(rows), summary, 0) if "token limit" in x]
    told = "2 of 4 transcripts cut at the token limit (1 clean, 1 recorded)"
    assert line == f"{told}{see('cut')}"
    whole = Results(ROWS)
    assert whole.summary()["cut"] == {}
    assert not any("token limit" in x for x in format_results(whole, whole.summary(), 0))


def test_a_reference_without_a_unit_has_no_rate():
    """Insertions into nothing: an infinite share, which JSON cannot represent."""
    rows = [row("a", "Um, uh.", "hello there"), row("b", "?!", "")]
    clean = Results(rows).summary()["conditions"]["clean"]
    assert clean["units"] == 0 and clean["insertions"] == 2
    for rates in (clean, clean["languages"]["en"]):
        assert [rates[k] for k in ("rate", "low", "high")] == [None] * 3
    assert "difference" not in compare(Results(rows), Results(rows))["clean"]
    not_finite = [Result(**{**vars(rows[0]), "entropy": math.nan})]
    assert json.loads(Results(not_finite).to_json_lines())["entropy"] is None


def test_characters_a_minute_have_an_interval_over_clips():
    clips = [row(f"n{i}", None, "x" * i, "white", 30.0) for i in range(10)]
    clips += [row("s0", None, "", "silence", 60.0), row("s1", None, "…", "silence", 60.0)]
    clips += [row("r", None, "hello", "recorded")]
    rates = Results([*clips, *ROWS[:2]]).summary()["hallucination"]["nonspeech"]
    assert list(rates) == ["white", "silence", "recorded", "all"]
    white, silence = rates["white"], rates["silence"]
    assert white["rate"] == pytest.approx(45 / 5)
    # The mean of 10 clips of variance 8.25 · 10/9 characters in half a minute, by Student's t.
    half = 2.262 * 2 * math.sqrt(8.25 / 9)
    assert white["low"] == pytest.approx(9 - half, abs=0.5)
    assert white["high"] == pytest.approx(9 + half, abs=0.5)
    assert (white["clips"], white["clips_with_text"]) == (10, 9)
    # Clips without any text do not show that there is never any.
    assert silence == {
        "rate": 0.0, "low": None, "high": None, "clips": 2, "clips_with_text": 0
    }  # fmt: skip
    assert rates["recorded"]["rate"] == 150 and rates["recorded"]["low"] is None
    assert rates["all"]["rate"] == pytest.approx(50 / (5 + 2 + 2 / 60))
    assert rates["all"]["clips"] == 13 and rates["all"]["low"] < rates["all"]["high"]
    assert Results(ROWS[:2]).summary()["hallucination"]["nonspeech"] == {}


def test_rows_survive_their_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(Results(ROWS).to_json_lines())
    assert read_results(path).rows == ROWS
    path.write_text("{}\n")
    with pytest.raises(UserError, match="transcripts"):
        read_results(path)


def test_paired_comparison_is_by_condition():
    better = [row(r.key, r.reference, r.reference or "", r.condition) for r in ROWS]
    tests = compare(Results(ROWS), Results(better))
    assert tests["clean"]["difference"] == pytest.approx(-1 / 6)
    assert tests["snr0"]["flagged_a"] == 1 and tests["snr0"]["flagged_b"] == 0
    assert tests["recorded"]["flagged_p"] == 1.0 and "difference" not in tests["cut50"]
    assert "characters_difference" not in tests["clean"]
    # Of more clips in one of them, those of both.
    fewer = compare(Results(ROWS), Results([r for r in better if r.condition == "clean"]))
    assert list(fewer) == ["clean"] and fewer["clean"] == tests["clean"]
    with pytest.raises(UserError, match="other clips"):
        compare(Results(ROWS[:1]), Results(better[1:]))
    other = [replace(r, reference="else") for r in better[:1]]
    with pytest.raises(UserError, match="another reference"):
        compare(Results(ROWS), Results(other))
    with pytest.raises(UserError, match="the same keys"):
        compare(Results([*ROWS, ROWS[0]]), Results([*better, better[0]]))


def test_paired_comparison_of_characters_a_minute():
    """Two systems that write text on every clip differ only in how much."""
    rng = np.random.default_rng(0)
    sizes = rng.integers(20, 60, 40)
    rows_a = [
        row(f"n{i}", None, "x" * k, ("white", "music")[i % 2], 30.0) for i, k in enumerate(sizes)
    ]
    rows_b = [
        Result(**{**vars(r), "hypothesis": r.hypothesis[: -8 - i % 5]})
        for i, r in enumerate(rows_a)
    ]
    quiet = [row(f"s{i}", None, "…", "silence", 60.0) for i in range(3)]
    single = [row("r", None, "hello", "recorded", 60.0)]
    a, b = (
        Results([*ROWS[:2], *rows_a, *quiet, *single]),
        Results([*ROWS[:2], *rows_b, *quiet, *single]),
    )
    tests = compare(a, b)
    assert list(tests) == ["clean", "white", "music", "silence", "recorded", "nonspeech"]
    white, nonspeech = tests["white"], tests["nonspeech"]
    assert white["flagged_a"] == white["flagged_b"] == 20 and white["flagged_p"] == 1
    # From 8 to 12 characters fewer in half a minute, 10 in the mean: −20 ± 1.96 · 2√2 / √20.
    assert white["characters_difference"] == pytest.approx(-20)
    half = 1.96 * 2 * math.sqrt(2 / 20)
    assert white["characters_low"] == pytest.approx(-20 - half, abs=0.3)
    assert white["characters_high"] == pytest.approx(-20 + half, abs=0.3)
    assert white["characters_p_value"] < 0.01 and white["characters_improved"] == 1
    assert nonspeech["utterances"] == 44 and nonspeech["characters_difference"] == pytest.approx(
        -400 / 24
    )
    assert nonspeech["characters_low"] < -400 / 24 < nonspeech["characters_high"] < 0
    # Neither wrote any text, or there is a single clip: no interval.
    silence, recorded = tests["silence"], tests["recorded"]
    assert silence["characters_difference"] == 0 and silence["characters_p_value"] == 1
    for test in (silence, recorded):
        assert math.isnan(test["characters_low"]) and math.isnan(test["characters_high"])
    assert math.isnan(recorded["characters_p_value"])
    reverse = compare(b, a)["white"]
    assert (
        reverse["characters_difference"] == pytest.approx(20)
        and reverse["characters_improved"] == 0
    )
    assert not any(name.startswith("characters") for name in tests["clean"])


def test_misrecognized_words_before_a_cut_are_not_invented():
    text = "turn on the kitchen light and close the bedroom window"
    assert not row("a", text, "burn in a chicken fight", "cut50").hallucinated
    # A true continuation passes; another ending or another sentence does not.
    assert not row("a", text, text, "cut50").hallucinated
    for hypothesis in (
        "turn on the kitchen light then we all went home again last night",
        "yesterday some old friends met near my new harbour house",
    ):
        assert row("a", text, hypothesis, "cut50").hallucinated


@pytest.mark.parametrize("rate", [0.4, 0.7, 1.0])
def test_substitutions_before_a_cut_are_not_flagged(rate):
    """A share ``rate`` of the words spoken before the cut is replaced by other words."""
    rng = random.Random(0)
    words = [f"w{i}" for i in range(500)]
    for _ in range(100):
        reference = rng.choices(words, k=rng.randint(6, 16))
        spoken = reference[: round(0.5 * len(reference))]
        hypothesis = [rng.choice(words) if rng.random() < rate else word for word in spoken]
        assert not row("a", " ".join(reference), " ".join(hypothesis), "cut50").hallucinated
        invented = [*spoken, *(f"m{i}" for i in range(8))]
        assert row("a", " ".join(reference), " ".join(invented), "cut50").hallucinated


@pytest.mark.parametrize(
    ("text", "hallucinated"), [("", False), ("。 …", False), ("oh。", True), ("[music]", True)]
)
def test_text_on_nonspeech_is_words_not_punctuation(text, hallucinated):
    assert row("x", None, text, "recorded").hallucinated is hallucinated


def test_sign_test_against_the_binomial():
    assert sign_test(0, 0) == 1.0 and sign_test(3, 3) == 1.0
    assert sign_test(0, 5) == pytest.approx(2 / 32)
    assert sign_test(1, 7) == sign_test(7, 1) == pytest.approx(2 * (1 + 8) / 256)
    assert math.isclose(sign_test(2, 4), 2 * (1 + 6 + 15) / 64)


def test_scores_of_rows_without_a_language_say_that_the_script_decided():
    rows = [
        row("a", "今天天气很好", "今天天汽很好", lang=""),
        row("b", "打开 wifi 吧", "打开 wifi", lang=""),
        row("c", "good morning", "good evening", lang=""),
    ]
    results = Results(rows)
    summary = results.summary()
    found = summary["conditions"]["clean"]["languages"]
    counts = {lang: (r["unit"], r["units"], r["rate"]) for lang, r in found.items()}
    assert counts == {
        "zh?": ("char", 6, 1 / 6), "zh-en?": ("mixed", 4, 1 / 4), "": ("word", 2, 1 / 2)
    }  # fmt: skip
    (line,) = [x for x in format_results(results, summary, 0) if "no language" in x]
    assert line == (
        "no language is given for some utterances: their script decides, zh? in characters, zh-en? "
        "in words and characters, other text in words; pack with --lang to say which it is"
    )
    given = Results([replace(r, lang="zh-en") for r in rows])
    assert not any("no language" in x for x in format_results(given, given.summary(), 0))
