"""Error rates (WER, CER, MER) with bootstrap intervals, and a paired test of two systems.

English is counted in words, Mandarin in characters, code-switched speech in mixed units.
rate = (S + D + I) / N, with substitutions, deletions and insertions of a minimal edit of the
reference's N units into the hypothesis (Levenshtein; counted by rapidfuzz, as in jiwer). Text is
normalized first (`dsasr.evaluation.normalize`). Rates are fractions, not percent; one over an empty
reference is infinite if there are insertions and NaN if there are none.

Intervals resample utterances (Bisani & Ney 2004, "Bootstrap estimates for confidence intervals in
ASR performance evaluation"; their ends: `utils.bootstrap`). So does the paired test, which draws
the same utterances for both systems. `ratio_interval` and `paired_ratio_test` do so for any ratio
of sums. A rate without any error has an upper bound instead (`bound_without_errors`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
from rapidfuzz.distance import Levenshtein

from dsasr.evaluation.normalize import normalize, scored_lang, unit_of, units
from dsasr.utils import bootstrap


@dataclass(frozen=True)
class EditCounts:
    """Edits that turn the reference into the hypothesis, in units; ``reference`` is N."""

    substitutions: int = 0
    deletions: int = 0
    insertions: int = 0
    reference: int = 0

    @property
    def errors(self) -> int:
        return self.substitutions + self.deletions + self.insertions

    @property
    def rate(self) -> float:
        return _ratio(self.errors, self.reference)

    def __add__(self, other: EditCounts) -> EditCounts:
        return EditCounts(
            self.substitutions + other.substitutions,
            self.deletions + other.deletions,
            self.insertions + other.insertions,
            self.reference + other.reference,
        )


def count_edits(reference: list[str] | str, hypothesis: list[str] | str) -> EditCounts:
    """`EditCounts` between two sequences of units; no normalization is applied."""
    counts = {"replace": 0, "delete": 0, "insert": 0}
    for edit in Levenshtein.editops(reference, hypothesis):
        counts[edit.tag] += 1
    return EditCounts(counts["replace"], counts["delete"], counts["insert"], len(reference))


@dataclass(frozen=True)
class UtteranceScore:
    """One scored pair: ``units`` in its language's unit, ``characters`` over the normalized text.

    ``key`` may be empty; the paired test then relies on the order of the pairs.
    """

    lang: str
    units: EditCounts
    characters: EditCounts
    key: str = ""


@dataclass(frozen=True)
class LangScores:
    """One language: its unit (``word``, ``char``, ``mixed``) and the edits of all utterances."""

    unit: str
    counts: EditCounts

    @property
    def rate(self) -> float:
        return self.counts.rate


@dataclass(frozen=True)
class Interval:
    """An estimate with its two-sided bootstrap interval at ``level``; without any error its upper
    bound at that level (`bound_without_errors`)."""

    value: float
    low: float
    high: float
    level: float


@dataclass(frozen=True)
class PairedTest:
    """``b`` against ``a``: ``difference`` = rate(b) − rate(a) with its interval.

    ``p_value`` is two-sided; ``improved`` is the share of draws in which b is strictly better, that
    is lower (Bisani & Ney's probability of improvement).
    """

    difference: float
    low: float
    high: float
    level: float
    p_value: float
    improved: float


@dataclass(frozen=True)
class Scores:
    """Error rates of a set of utterances (built by `score`).

    ``wer``, ``cer`` and ``mer`` are over the languages scored in words, in characters and in mixed
    units (NaN where there are none); ``rate`` is over all, each in its own unit;
    ``character_rate`` counts characters of the normalized text for every language (single spaces
    included, as in jiwer's CER). ``rules`` name the normalization (`normalize.normalize`).
    """

    utterances: list[UtteranceScore] = field(default_factory=list)
    rules: str = "standard"

    def __len__(self) -> int:
        return len(self.utterances)

    @property
    def counts(self) -> EditCounts:
        return sum((u.units for u in self.utterances), EditCounts())

    @property
    def rate(self) -> float:
        return self.counts.rate

    @property
    def wer(self) -> float:
        return self._rate_in("word")

    @property
    def cer(self) -> float:
        return self._rate_in("char")

    @property
    def mer(self) -> float:
        return self._rate_in("mixed")

    @property
    def character_rate(self) -> float:
        return sum((u.characters for u in self.utterances), EditCounts()).rate

    @property
    def sentence_rate(self) -> float:
        """Share of utterances with at least one error."""
        return _ratio(sum(u.units.errors > 0 for u in self.utterances), len(self))

    @property
    def by_lang(self) -> dict[str, LangScores]:
        """Scores per language tag, sorted by tag."""
        langs = sorted({u.lang for u in self.utterances})
        return {lang: LangScores(unit_of(lang), self.of_lang(lang).counts) for lang in langs}

    def of_lang(self, lang: str) -> Scores:
        """The utterances of one language tag."""
        return Scores([u for u in self.utterances if u.lang == lang], self.rules)

    def interval(self, *, level: float = 0.95, draws: int = 1000, seed: int = 0) -> Interval:
        """`rate` with its `ratio_interval` over utterances."""
        return ratio_interval(
            *_errors_and_units(self.utterances), level=level, draws=draws, seed=seed
        )

    def summary(self) -> dict[str, float]:
        """Flat scalars for a log; rates that are not finite are left out."""
        total = self.counts
        scalars = {
            "wer": self.wer,
            "cer": self.cer,
            "mer": self.mer,
            "character_rate": self.character_rate,
            "sentence_rate": self.sentence_rate,
            "substitutions": _ratio(total.substitutions, total.reference),
            "deletions": _ratio(total.deletions, total.reference),
            "insertions": _ratio(total.insertions, total.reference),
            "utterances": float(len(self)),
        }
        if len(by_lang := self.by_lang) > 1:
            scalars |= {f"{RATE_NAMES[s.unit]}/{lang}": s.rate for lang, s in by_lang.items()}
        return {name: value for name, value in scalars.items() if math.isfinite(value)}

    def _rate_in(self, unit: str) -> float:
        rows = [u.units for u in self.utterances if unit_of(u.lang) == unit]
        return sum(rows, EditCounts()).rate


# Below so few utterances a bootstrap over them says nothing: no interval is shown.
FEWEST_FOR_INTERVAL = 8


def interval_ends(scores: Scores) -> dict[str, float]:
    """Flat scalars for a log: ``wer_low``, ``wer_high`` … of each rate of `Scores.summary` that is
    over `FEWEST_FOR_INTERVAL` utterances or more."""
    ends = {}
    for unit, name in RATE_NAMES.items():
        of_unit = Scores([u for u in scores.utterances if unit_of(u.lang) == unit], scores.rules)
        if len(of_unit) >= FEWEST_FOR_INTERVAL:
            interval = of_unit.interval()
            ends |= {f"{name}_low": interval.low, f"{name}_high": interval.high}
    return {name: value for name, value in ends.items() if math.isfinite(value)}


RATE_NAMES = {"word": "wer", "char": "cer", "mixed": "mer"}


def score(
    pairs: Iterable[tuple[str, str, str] | tuple[str, str, str, str]], rules: str = "standard"
) -> Scores:
    """`Scores` of (reference, hypothesis, lang) or (reference, hypothesis, lang, key) tuples.

    A pair without a language is scored by the script of its reference (`scored_lang`), and its
    tag says so: ``zh?``.
    """
    return Scores([_score_utterance(rules, *pair) for pair in pairs], rules)


def _score_utterance(
    rules: str, reference: str, hypothesis: str, lang: str, key: str = ""
) -> UtteranceScore:
    lang = scored_lang(lang, reference)
    sides = (reference, lang, rules), (hypothesis, lang, rules)
    return UtteranceScore(
        lang=lang,
        units=count_edits(*(units(*side) for side in sides)),
        characters=count_edits(*(normalize(*side) for side in sides)),
        key=key,
    )


def ratio_interval(
    numerators_N: np.ndarray,
    denominators_N: np.ndarray,
    *,
    level: float = 0.95,
    draws: int = 1000,
    seed: int = 0,
) -> Interval:
    """Σ ``numerators_N`` / Σ ``denominators_N`` over N utterances or clips, with a bootstrap
    interval; both ends are NaN where the denominators are all zero.

    Where the numerators are all zero, so is every draw: the interval then reaches up to
    `bound_without_errors`, which holds of error rates, but not of a ratio with another unit.
    """
    value = _ratio(float(numerators_N.sum()), float(denominators_N.sum()))
    if not denominators_N.any():
        return Interval(value, math.nan, math.nan, level)
    if not numerators_N.any():
        high = bound_without_errors(np.count_nonzero(denominators_N), level)
        return Interval(value, 0.0, high, level)
    (ratios,) = bootstrap.resampled_ratios([numerators_N], denominators_N, draws, seed)
    low, high = bootstrap.interval(ratios, numerators_N, denominators_N, level)
    return Interval(value, low, high, level)


def bound_without_errors(count: int, level: float = 0.95) -> float:
    """The upper bound at ``level`` of an error rate, a fraction, when none of ``count`` utterances
    has an error.

    1 − (1 − level)^(1/count), the exact form of the rule of three, 3 / count (Hanley &
    Lippman-Hand 1983, "If nothing goes wrong, is everything all right?"). It bounds the share of
    utterances that have an error, and so the rate if an error spoils a whole utterance at most.
    Over units it would be tighter, and wrong: errors come together in an utterance.
    """
    return 1 - (1 - level) ** (1 / count)


def paired_test(
    a: Scores, b: Scores, *, level: float = 0.95, draws: int = 2000, seed: int = 0
) -> PairedTest:
    """`paired_ratio_test` of two systems' error rates on the same utterances.

    Utterances are matched by key where all keys are distinct, else by order. Raises ValueError when
    the two were not scored on the same references.
    """
    rows_a, rows_b = _matched(a, b)
    errors_a, reference_a = _errors_and_units(rows_a)
    errors_b, reference_b = _errors_and_units(rows_b)
    if not len(rows_a) or not np.array_equal(reference_a, reference_b):
        raise ValueError("the two systems were not scored on the same references")
    return paired_ratio_test(errors_a, errors_b, reference_a, level=level, draws=draws, seed=seed)


def paired_ratio_test(
    numerators_a_N: np.ndarray,
    numerators_b_N: np.ndarray,
    denominators_N: np.ndarray,
    *,
    level: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> PairedTest:
    """Paired bootstrap of two systems' ratios of sums over the same N utterances or clips.

    A system's ratio is Σ numerators / Σ ``denominators_N``; ``difference`` is b's less a's.

    The two-sided p-value is twice the smaller tail of the resampled differences at zero, a tie
    counting to both, with one added to numerator and denominator so that it is never zero; it is
    not corrected for few utterances, as the interval is, and a little too small below 50. A single
    pair has no spread: only its difference is defined, and the rest is NaN.
    """
    difference = _ratio(
        float(numerators_b_N.sum() - numerators_a_N.sum()), float(denominators_N.sum())
    )
    if len(denominators_N) < 2:
        return PairedTest(difference, math.nan, math.nan, level, math.nan, math.nan)
    change_N = numerators_b_N - numerators_a_N
    (delta,) = bootstrap.resampled_ratios([change_N], denominators_N, draws, seed)
    low, high = (
        bootstrap.interval(delta, change_N, denominators_N, level)
        if denominators_N.any()
        else (math.nan, math.nan)
    )
    tail = min((delta <= 0).sum(), (delta >= 0).sum())
    return PairedTest(
        difference=difference,
        low=low,
        high=high,
        level=level,
        p_value=min(1.0, 2 * (int(tail) + 1) / (draws + 1)),
        improved=float((delta < 0).mean()),
    )


def _matched(a: Scores, b: Scores) -> tuple[list[UtteranceScore], list[UtteranceScore]]:
    keys_a, keys_b = {u.key for u in a.utterances}, {u.key for u in b.utterances}
    if len(a) != len(b):
        raise ValueError(f"the two systems were scored on {len(a)} and {len(b)} utterances")
    if len(keys_a) == len(a) and "" not in keys_a:
        if keys_a != keys_b:
            raise ValueError("the two systems were scored on utterances with other keys")
        return sorted(a.utterances, key=_key), sorted(b.utterances, key=_key)
    return a.utterances, b.utterances


def _key(row: UtteranceScore) -> str:
    return row.key


def _errors_and_units(rows: list[UtteranceScore]) -> tuple[np.ndarray, np.ndarray]:
    errors = np.array([u.units.errors for u in rows], dtype=np.float64)
    return errors, np.array([u.units.reference for u in rows], dtype=np.float64)


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else (math.inf if numerator else math.nan)
