import math
import random

import jiwer
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsasr.evaluation.error_rate import (
    EditCounts,
    bound_without_errors,
    count_edits,
    paired_ratio_test,
    paired_test,
    ratio_interval,
    score,
)

WORDS = ["the", "cat", "sat", "on", "a", "mat", "dog", "ran", "far", "away", "home", "blue"]


def _pairs(n, seed=0, noise=0.3):
    rng = random.Random(seed)
    rows = []
    for i in range(n):
        ref = rng.choices(WORDS, k=rng.randint(1, 12))
        hyp = []
        for word in ref:
            draw = rng.random()
            if draw < noise / 3:
                continue
            hyp.append(rng.choice(WORDS) if draw < 2 * noise / 3 else word)
            if draw > 1 - noise / 3:
                hyp.append(rng.choice(WORDS))
        rows.append((" ".join(ref), " ".join(hyp), "en", f"u{i:03d}"))
    return rows


def test_agrees_with_jiwer():
    pairs = _pairs(200)
    ours = score(pairs)
    theirs = jiwer.process_words([p[0] for p in pairs], [p[1] for p in pairs])
    assert ours.wer == pytest.approx(theirs.wer, abs=1e-12)
    total = ours.counts
    assert (total.substitutions, total.deletions, total.insertions) == (
        theirs.substitutions,
        theirs.deletions,
        theirs.insertions,
    )
    cer = jiwer.cer([p[0] for p in pairs], [p[1] for p in pairs])
    assert ours.character_rate == pytest.approx(cer, abs=1e-12)


def _distance(a, b):
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        last, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            last, row[j] = row[j], min(last + (x != y), row[j] + 1, row[j - 1] + 1)
    return row[-1]


@given(st.lists(st.sampled_from("abc"), max_size=9), st.lists(st.sampled_from("abc"), max_size=9))
def test_counts_are_a_minimal_edit(ref, hyp):
    c = count_edits(ref, hyp)
    assert c.errors == _distance(ref, hyp)
    assert len(ref) - c.deletions + c.insertions == len(hyp)
    assert c.reference == len(ref)


def test_known_counts():
    assert count_edits(["a", "b", "c", "d"], ["a", "x", "c", "d", "e"]) == EditCounts(1, 0, 1, 4)
    assert count_edits(["a", "b", "c"], []) == EditCounts(0, 3, 0, 3)
    assert count_edits([], ["a"]).rate == math.inf
    assert math.isnan(count_edits([], []).rate)


def test_units_by_language():
    scores = score(
        [
            ("It's ten o'clock.", "it is 10 o'clock", "en"),
            ("二十个人", "20 个 人。", "zh"),
            ("今天天气", "今天天汽", "zh"),
            ("我要book两本", "我要 look 2本", "zh-en"),
        ]
    )
    assert scores.wer == 0
    assert scores.cer == 1 / 8
    assert scores.mer == 1 / 5
    by_lang = scores.by_lang
    assert list(by_lang) == ["en", "zh", "zh-en"]
    assert by_lang["zh"].counts == EditCounts(1, 0, 0, 8)
    assert by_lang["zh"].unit == "char"
    assert scores.sentence_rate == 0.5
    assert scores.of_lang("zh").rate == 1 / 8
    assert math.isnan(scores.of_lang("zh").wer)
    assert scores.summary()["cer/zh"] == 1 / 8
    assert "mer" not in scores.of_lang("zh").summary()


def test_digit_strings_need_plain_rules():
    pair = ("eight oh nine two", "eight oh nine three", "en")
    assert score([pair]).wer == 1
    assert score([pair], rules="plain").wer == 0.25
    with pytest.raises(ValueError, match="rules must be"):
        score([pair], rules="none")


def test_empty_scores():
    scores = score([])
    assert math.isnan(scores.rate) and scores.by_lang == {}
    assert math.isnan(scores.interval().low)
    assert scores.summary() == {"utterances": 0}


def test_interval_covers():
    # Errors are Bernoulli per one-word utterance, so that the true spread is known.
    rng = np.random.default_rng(3)
    inside, widths = 0, []
    for seed in range(100):
        wrong = rng.random(80) < 0.3
        scores = score([("a", "b" if w else "a", "de") for w in wrong])
        interval = scores.interval(draws=400, seed=seed)
        assert interval.low <= interval.value <= interval.high
        inside += interval.low <= 0.3 <= interval.high
        widths.append(interval.high - interval.low)
    assert 85 <= inside <= 100
    # No wider than that takes: the normal interval of a share of 80.
    assert np.mean(widths) == pytest.approx(2 * 1.96 * math.sqrt(0.3 * 0.7 / 80), rel=0.05)
    assert scores.interval(draws=50, seed=1) == scores.interval(draws=50, seed=1)


def test_without_errors_the_interval_reaches_up_to_the_rule_of_three():
    """However long the utterances are: the errors of one come together."""
    for count, high in ((1, 0.95), (16, 0.1707), (300, 0.00994)):
        interval = score([("a b c", "a b c", "en")] * count).interval()
        assert (interval.value, interval.low) == (0, 0)
        assert interval.high == pytest.approx(high, abs=5e-5)
    # At that rate, errors are missed in 5% of the sets; an empty reference says nothing.
    assert (1 - bound_without_errors(40)) ** 40 == pytest.approx(0.05)
    assert bound_without_errors(300) == pytest.approx(3 / 300, rel=0.01)
    assert score([("a", "a", "en"), ("", "", "en")]).interval().high == pytest.approx(0.95)


def test_ratios_of_seconds_are_resampled_like_those_of_units():
    """Denominators may be below 1; if they sum to zero, there is no interval."""
    numerators_N, denominators_N = np.array([1.0, 0.0, 2.0]), np.array([0.05, 0.05, 0.05])
    span = ratio_interval(numerators_N, denominators_N, draws=500)
    assert span.value == pytest.approx(20) and span.low <= 10 and span.high == pytest.approx(40)
    assert span == ratio_interval(numerators_N, denominators_N, draws=500)
    none = ratio_interval(numerators_N, np.zeros(3))
    assert math.isinf(none.value) and math.isnan(none.low) and math.isnan(none.high)


def test_paired_test_sees_a_difference_and_none():
    pairs = _pairs(150, seed=1)
    good = score([(r, r, la, k) for r, _, la, k in pairs])
    bad = score(pairs)
    test = paired_test(bad, good)
    assert test.p_value < 0.01 and test.improved > 0.99 and test.high < 0
    assert test.difference == pytest.approx(-bad.rate)
    same = paired_test(bad, score(pairs[::-1]))
    assert (same.difference, same.p_value, same.improved) == (0, 1, 0)


def test_paired_p_value_is_uniform_under_the_null():
    rng = np.random.default_rng(0)
    small = 0
    for seed in range(100):
        a, b = rng.random((2, 60)) < 0.3
        scores_a, scores_b = (
            score([("a", "b" if w else "a", "de") for w in side]) for side in (a, b)
        )
        small += paired_test(scores_a, scores_b, draws=400, seed=seed).p_value < 0.1
    assert 4 <= small <= 20  # 10 expected, with a standard deviation of 3


def test_a_single_pair_has_a_difference_and_no_test():
    test = paired_ratio_test(np.array([0.0]), np.array([3.0]), np.array([0.5]))
    assert test.difference == 6
    assert all(math.isnan(x) for x in (test.low, test.high, test.p_value, test.improved))


def test_paired_test_rejects_other_references():
    with pytest.raises(ValueError, match="5 and 4"):
        paired_test(score(_pairs(5)), score(_pairs(4)))
    with pytest.raises(ValueError, match="same references"):
        paired_test(score([("a", "a", "en")]), score([("a b", "a", "en")]))
    with pytest.raises(ValueError, match="keys"):
        paired_test(score([("a", "a", "en", "k")]), score([("a", "a", "en", "l")]))


@pytest.mark.parametrize(
    ("text", "tag", "units"),
    [
        ("今天天气很好", "zh?", 6), ("打开 wifi 吧", "zh-en?", 4), ("今日は", "ja?", 3),
        ("안녕하세요", "ko?", 5), ("สวัสดี", "th?", 6),
        ("good morning", "", 2), ("Привет мир", "", 2),
    ],
)  # fmt: skip
def test_a_text_without_a_language_is_scored_as_its_script_is(text, tag, units):
    scores = score([(text, text, ""), (text, text, "")])
    assert scores.counts.reference == 2 * units and list(scores.by_lang) == [tag]
    given = score([(text, "", tag.rstrip("?") or "en")])
    assert given.counts.reference == units


def test_one_wrong_character_is_not_a_wrong_sentence():
    scores = score([("今天天气很好", "今天天汽很好", "")])
    assert scores.rate == scores.cer == pytest.approx(1 / 6)
