"""Error rates: words for English, characters for Mandarin, mixed units for code-switched speech.

rate = (S + D + I) / N, with substitutions, deletions and insertions of a minimal edit of the
reference's N units into the hypothesis (Levenshtein; counted by rapidfuzz, as in jiwer). Text is
normalized first (`dsasr.evaluation.normalize`). Rates are fractions, not percent; one over an empty
reference is infinite if there are insertions and NaN if there are none.

Intervals resample utterances (Bisani & Ney 2004, "Bootstrap estimates for confidence intervals in
ASR performance evaluation"); so does the paired test, which draws the same utterances for both
systems. `ratio_interval` and `paired_ratios` do so for any ratio of sums.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
from rapidfuzz.distance import Levenshtein

from dsasr.evaluation.normalize import normalize, unit_of, units


@dataclass(frozen=True)
class Counts:
    """Edits that make the hypothesis from the reference, in units; ``reference`` is N."""

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

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            self.substitutions + other.substitutions,
            self.deletions + other.deletions,
            self.insertions + other.insertions,
            self.reference + other.reference,
        )


def count(reference: list[str] | str, hypothesis: list[str] | str) -> Counts:
    """`Counts` between two sequences of units, no normalization applied."""
    tally = {"replace": 0, "delete": 0, "insert": 0}
    for edit in Levenshtein.editops(reference, hypothesis):
        tally[edit.tag] += 1
    return Counts(tally["replace"], tally["delete"], tally["insert"], len(reference))


@dataclass(frozen=True)
class Utterance:
    """One scored pair: ``units`` in its language's unit, ``characters`` over the normalized text.

    ``key`` may be empty; the paired test then relies on the order of the pairs.
    """

    lang: str
    units: Counts
    characters: Counts
    key: str = ""


@dataclass(frozen=True)
class LangScores:
    """One language: its unit (``word``, ``char``, ``mixed``), summed counts, utterances."""

    unit: str
    counts: Counts
    characters: Counts
    utterances: int
    exact: int

    @property
    def rate(self) -> float:
        return self.counts.rate


@dataclass(frozen=True)
class Interval:
    """An estimate with its two-sided bootstrap percentile interval at ``level``."""

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


@dataclass
class Scores:
    """Error rates of a set, built pair by pair; sets of other ranks are merged in.

    ``wer``, ``cer`` and ``mer`` are over the languages scored in words, in characters and in mixed
    units (NaN where there are none); ``rate`` is over all, each in its own unit;
    ``character_rate`` counts characters of the normalized text for every language (single spaces
    included, as in jiwer's CER). ``rules`` say the normalization (`normalize.normalize`).
    """

    utterances: list[Utterance] = field(default_factory=list)
    rules: str = "standard"

    def add(self, reference: str, hypothesis: str, lang: str, key: str = "") -> Utterance:
        """Score one pair and keep it. Returns its counts."""
        sides = (reference, lang, self.rules), (hypothesis, lang, self.rules)
        row = Utterance(
            lang=lang,
            units=count(*(units(*side) for side in sides)),
            characters=count(*(normalize(*side) for side in sides)),
            key=key,
        )
        self.utterances.append(row)
        return row

    def merge(self, other: Scores) -> Scores:
        """Add the other's utterances behind ours; returns self.

        Raises ValueError if the other was scored by other rules.
        """
        if other.rules != self.rules:
            raise ValueError(f"scored by {self.rules} and by {other.rules} rules")
        self.utterances.extend(other.utterances)
        return self

    def state(self) -> dict:
        """JSON-able rows: what a rank sends to another (`from_state`, then `merge`)."""
        return {
            "rules": self.rules,
            "langs": [u.lang for u in self.utterances],
            "keys": [u.key for u in self.utterances],
            "units": [_row(u.units) for u in self.utterances],
            "characters": [_row(u.characters) for u in self.utterances],
        }

    @classmethod
    def from_state(cls, state: dict) -> Scores:
        rows = zip(state["langs"], state["keys"], state["units"], state["characters"], strict=True)
        utterances = [Utterance(la, Counts(*u), Counts(*c), key) for la, key, u, c in rows]
        return cls(utterances, state["rules"])

    def __len__(self) -> int:
        return len(self.utterances)

    @property
    def counts(self) -> Counts:
        return sum((u.units for u in self.utterances), Counts())

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
        return sum((u.characters for u in self.utterances), Counts()).rate

    @property
    def sentence_rate(self) -> float:
        """Share of utterances with at least one error."""
        return _ratio(sum(u.units.errors > 0 for u in self.utterances), len(self))

    @property
    def by_lang(self) -> dict[str, LangScores]:
        """Scores per language tag, sorted by tag."""
        out = {}
        for lang in sorted({u.lang for u in self.utterances}):
            rows = [u for u in self.utterances if u.lang == lang]
            out[lang] = LangScores(
                unit=unit_of(lang),
                counts=sum((u.units for u in rows), Counts()),
                characters=sum((u.characters for u in rows), Counts()),
                utterances=len(rows),
                exact=sum(u.units.errors == 0 for u in rows),
            )
        return out

    def only(self, lang: str) -> Scores:
        """The utterances of one language tag."""
        return Scores([u for u in self.utterances if u.lang == lang], self.rules)

    def interval(self, *, level: float = 0.95, draws: int = 1000, seed: int = 0) -> Interval:
        """`rate` with its `ratio_interval` over utterances."""
        return ratio_interval(*_columns(self.utterances), level=level, draws=draws, seed=seed)

    def summary(self) -> dict[str, float]:
        """Flat scalars for a log; rates that do not exist are left out."""
        total = self.counts
        named = {
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
            named |= {f"{_SHORT[s.unit]}/{lang}": s.rate for lang, s in by_lang.items()}
        return {name: value for name, value in named.items() if math.isfinite(value)}

    def _rate_in(self, unit: str) -> float:
        rows = [u.units for u in self.utterances if unit_of(u.lang) == unit]
        return sum(rows, Counts()).rate


_SHORT = {"word": "wer", "char": "cer", "mixed": "mer"}


def score(
    pairs: Iterable[tuple[str, str, str] | tuple[str, str, str, str]], rules: str = "standard"
) -> Scores:
    """`Scores` of ``(reference, hypothesis, lang)`` triples, or quadruples with a key behind."""
    scores = Scores(rules=rules)
    for pair in pairs:
        scores.add(*pair)
    return scores


def ratio_interval(
    over_N: np.ndarray,
    under_N: np.ndarray,
    *,
    level: float = 0.95,
    draws: int = 1000,
    seed: int = 0,
) -> Interval:
    """Σ ``over_N`` / Σ ``under_N`` of N utterances or clips, with a percentile interval over
    resampled ones; without anything under, both ends are NaN."""
    value = _ratio(float(over_N.sum()), float(under_N.sum()))
    if not under_N.any():
        return Interval(value, math.nan, math.nan, level)
    (ratios,) = _resample([over_N], under_N, draws, seed)
    low, high = np.quantile(ratios, [(1 - level) / 2, (1 + level) / 2])
    return Interval(value, float(low), float(high), level)


def paired_test(
    a: Scores, b: Scores, *, level: float = 0.95, draws: int = 2000, seed: int = 0
) -> PairedTest:
    """`paired_ratios` of two systems' error rates on the same utterances.

    Pairs are matched by key where all have distinct ones, else by order. Raises ValueError when the
    two were not scored on the same references.
    """
    rows_a, rows_b = _matched(a, b)
    errors_a, reference_a = _columns(rows_a)
    errors_b, reference_b = _columns(rows_b)
    if not len(rows_a) or not np.array_equal(reference_a, reference_b):
        raise ValueError("the two systems were not scored on the same references")
    return paired_ratios(errors_a, errors_b, reference_a, level=level, draws=draws, seed=seed)


def paired_ratios(
    over_a_N: np.ndarray,
    over_b_N: np.ndarray,
    under_N: np.ndarray,
    *,
    level: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> PairedTest:
    """Paired bootstrap of Σ ``over_b_N`` / Σ ``under_N`` against a's, over N utterances or clips.

    The two-sided p-value is twice the smaller tail of the resampled differences at zero, a tie
    counting to both, with one added to numerator and denominator so that it is never zero. A single
    pair has no spread: of it only the difference is known, the rest is NaN.
    """
    difference = _ratio(float(over_b_N.sum() - over_a_N.sum()), float(under_N.sum()))
    if len(under_N) < 2:
        return PairedTest(difference, math.nan, math.nan, level, math.nan, math.nan)
    ratios_a, ratios_b = _resample([over_a_N, over_b_N], under_N, draws, seed)
    delta = ratios_b - ratios_a
    low, high = np.quantile(delta, [(1 - level) / 2, (1 + level) / 2])
    tail = min((delta <= 0).sum(), (delta >= 0).sum())
    return PairedTest(
        difference=difference,
        low=float(low),
        high=float(high),
        level=level,
        p_value=min(1.0, 2 * (int(tail) + 1) / (draws + 1)),
        improved=float((delta < 0).mean()),
    )


def _matched(a: Scores, b: Scores) -> tuple[list[Utterance], list[Utterance]]:
    keys_a, keys_b = {u.key for u in a.utterances}, {u.key for u in b.utterances}
    if len(a) != len(b):
        raise ValueError(f"the two systems were scored on {len(a)} and {len(b)} utterances")
    if len(keys_a) == len(a) and "" not in keys_a:
        if keys_a != keys_b:
            raise ValueError("the two systems were scored on utterances with other keys")
        return sorted(a.utterances, key=_key), sorted(b.utterances, key=_key)
    return a.utterances, b.utterances


def _key(row: Utterance) -> str:
    return row.key


def _columns(rows: list[Utterance]) -> tuple[np.ndarray, np.ndarray]:
    errors = np.array([u.units.errors for u in rows], dtype=np.float64)
    return errors, np.array([u.units.reference for u in rows], dtype=np.float64)


def _resample(
    overs: list[np.ndarray], under_N: np.ndarray, draws: int, seed: int
) -> list[np.ndarray]:
    """Ratios [draws] per system, the same draw of utterances for each, in bounded memory.

    A draw with nothing under is counted as if one unit were.
    """
    rng = np.random.default_rng(seed)
    size = len(under_N)
    chunk = max(1, 2_000_000 // size)
    out: list[list[np.ndarray]] = [[] for _ in overs]
    for start in range(0, draws, chunk):
        picks = rng.integers(0, size, (min(chunk, draws - start), size))
        total = under_N[picks].sum(1)
        total = np.where(total > 0, total, 1)
        for ratios, over_N in zip(out, overs, strict=True):
            ratios.append(over_N[picks].sum(1) / total)
    return [np.concatenate(ratios) for ratios in out]


def _row(counts: Counts) -> list[int]:
    return [counts.substitutions, counts.deletions, counts.insertions, counts.reference]


def _ratio(over: float, under: float) -> float:
    return over / under if under else (math.inf if over else math.nan)
