"""Results of an evaluation: every transcript with its condition, their scores, and a comparison.

`Results` holds the rows and sums them up: error rates with intervals and hallucinations, each by
language and condition; `compare` is the paired test of two systems on the same clips. Rows are
stored as JSON lines, so that they can be scored again later. Conditions: `dsasr.evaluation.suite`.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from dsasr.evaluation.error_rate import (
    PairedTest,
    Scores,
    paired_ratio_test,
    paired_test,
    ratio_interval,
    score,
)
from dsasr.evaluation.hallucination import (
    HallucinationConfig,
    HallucinationReport,
    count_characters,
    find_hallucinations,
)
from dsasr.evaluation.normalize import scored_lang
from dsasr.evaluation.suite import CLEAN, spoken_prefix, truncated_share
from dsasr.utils.errors import UserError
from dsasr.utils.io import nonfinite_to_none, read_lines, to_json

ALL, NONSPEECH = "all", "nonspeech"  # names of rows over several conditions


@dataclass(frozen=True)
class Result:
    """The transcript of one recording or clip, and what it is scored against.

    ``reference`` is None for non-speech; of truncated speech it is the whole text. ``entropy`` is
    the mean predictive entropy of the transcript's tokens in nats (None: not finite); ``finished``
    is False where the token limit cut the transcript. ``speaker`` is empty where it is not known.

    By the CTC head (`dsasr.evaluation.ctc_scoring`; None: it has no score): ``margin`` in nats per
    phoneme, ``heard`` in nats per second, ``weakest``: the confidence of the three least certain
    words in a row. ``doubt``: `dsasr.evaluation.doubt`.
    """

    key: str
    condition: str
    lang: str
    reference: str | None
    hypothesis: str
    seconds: float
    entropy: float | None
    finished: bool
    speaker: str = ""
    margin: float | None = None
    heard: float | None = None
    weakest: float | None = None
    doubt: tuple[str, ...] = ()

    @property
    def scored_lang(self) -> str:
        """The language by whose rules it is scored (`normalize.scored_lang`)."""
        return scored_lang(self.lang, self.reference or "")

    @property
    def spoken(self) -> str:
        """The part of the reference that the audio holds: all of it unless it was truncated."""
        share, text = truncated_share(self.condition), self.reference or ""
        return (
            text if share is None else spoken_prefix(text, self.hypothesis, self.scored_lang, share)
        )

    @property
    def wrong(self) -> bool:
        """Hallucinated, or with errors in more than half of its units."""
        if self.hallucinated or self.reference is None:
            return self.hallucinated
        if truncated_share(self.condition) is not None:
            return False  # the words spoken are not known
        scores = score([(self.reference, self.hypothesis, self.lang, self.key)])
        return 2 * scores.counts.errors > scores.counts.reference

    @property
    def hallucinated(self) -> bool:
        """Whether it holds a hallucination, which on non-speech is any text."""
        if self.reference is None:
            return count_characters(self.hypothesis) > 0
        return bool(find_hallucinations(self.spoken, self.hypothesis, self.scored_lang))


@dataclass
class Results:
    """The results of a system on a set, one row per recording or clip."""

    rows: list[Result] = field(default_factory=list)

    def conditions(self) -> list[str]:
        """The conditions of the rows, in the order of their first row."""
        return list(dict.fromkeys(row.condition for row in self.rows))

    def scores(self, condition: str = CLEAN, rules: str = "standard") -> Scores:
        """Error rates under a condition, over the rows with a reference.

        Truncated speech has none, since the words spoken before the cut are not known. ``rules``:
        `normalize.normalize`.
        """
        if truncated_share(condition) is not None:
            return Scores(rules=rules)
        return score(
            (
                (row.reference, row.hypothesis, row.lang, row.key)
                for row in self.rows
                if row.condition == condition and row.reference
            ),
            rules,
        )

    def hallucinations(self, config: HallucinationConfig | None = None) -> HallucinationReport:
        """Counts and examples by language and condition."""
        report = HallucinationReport(config or HallucinationConfig())
        for row in self.rows:
            labels = {"condition": row.condition, "key": row.key}
            if row.reference is None:
                report.add_nonspeech(row.hypothesis, row.seconds, row.lang, **labels)
            else:
                report.add(row.spoken, row.hypothesis, row.scored_lang, **labels)
        return report

    def summary(self, rules: str = "standard") -> dict[str, Any]:
        """JSON-able: rates in fractions with 95% intervals by condition and language; counts,
        ``cut`` that of transcripts cut at the token limit.

        None stands for a rate that is not defined, such as one over references without a unit.
        """
        summary: dict[str, Any] = dict(self.scores(rules=rules).summary())
        summary["conditions"] = {}
        for condition in self.conditions():
            scores = self.scores(condition, rules)
            if not len(scores):
                continue
            summary["conditions"][condition] = _rate_row(scores) | {
                "languages": {
                    lang: _rate_row(scores.of_lang(lang)) | {"unit": of_lang.unit}
                    for lang, of_lang in scores.by_lang.items()
                }
            }
        summary["cut"] = self.cut()
        summary["doubt"] = self.doubts()
        report = self.hallucinations()
        summary["hallucination"] = {
            "totals": report.summary(),
            "rows": list(report.rows()),
            "nonspeech": self.nonspeech_rates(),
            "examples": [asdict(e) for e in report.examples],
        }
        return nonfinite_to_none(summary)

    def cut(self) -> dict[str, int]:
        """Transcripts cut at the token limit, by condition; only conditions that have some."""
        return dict(Counter(row.condition for row in self.rows if not row.finished))

    def doubts(self) -> dict[str, dict[str, float]]:
        """Counts by condition, over its transcripts with text: how many are in doubt, by kind;
        how many are wrong (hallucinated, or more than half of the units are), and how many of
        those are in doubt."""
        found: dict[str, dict[str, float]] = {}
        for row in self.rows:
            if not row.hypothesis:
                continue
            counts = found.setdefault(
                row.condition, {"transcripts": 0, "doubtful": 0, "wrong": 0, "wrong_doubtful": 0}
            )
            counts["transcripts"] += 1
            counts["doubtful"] += bool(row.doubt)
            counts["wrong"] += row.wrong
            counts["wrong_doubtful"] += row.wrong and bool(row.doubt)
            for kind in row.doubt:
                counts[kind] = counts.get(kind, 0) + 1
        return found

    def nonspeech_rates(self) -> dict[str, dict[str, float]]:
        """Characters a minute transcribed from non-speech, by condition and over `ALL` of them.

        ``rate`` is Σ characters / Σ minutes; ``low`` and ``high`` are its 95% `ratio_interval` over
        clips (**ours**). Both are NaN for a single clip and where no clip has text: all draws would
        be alike, and the rule of three bounds how often a clip has text, not how much.
        """
        clips = [row for row in self.rows if row.reference is None]
        rates = {}
        for name in (*dict.fromkeys(row.condition for row in clips), *[ALL] * bool(clips)):
            rows = [row for row in clips if name in (row.condition, ALL)]
            characters_N, minutes_N = _characters(rows), _minutes(rows)
            interval = ratio_interval(characters_N, minutes_N)
            bounded = len(rows) > 1 and characters_N.any()
            rates[name] = {
                "rate": interval.value,
                "low": interval.low if bounded else math.nan,
                "high": interval.high if bounded else math.nan,
                "clips": len(rows),
                "clips_with_text": int((characters_N > 0).sum()),
            }
        return rates

    def to_json_lines(self) -> str:
        """One JSON object a line and row; `read_results` reads them back."""
        return "".join(to_json(vars(row)) + "\n" for row in self.rows)


def read_results(path: Path) -> Results:
    """Results from a file of `Results.to_json_lines`. Raises `UserError`."""
    try:
        rows = [Result(**json.loads(line)) for line in read_lines(path)]
        return Results([replace(row, doubt=tuple(row.doubt)) for row in rows])
    except FileNotFoundError:
        fix = "`dsasr evaluate RUN --report` or `--out FILE` writes one"
        raise UserError(f"there is no {path}: {fix}") from None
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} holds no transcripts of `dsasr evaluate`: {error}") from None


def compare(a: Results, b: Results, rules: str = "standard") -> dict[str, dict[str, float]]:
    """Paired tests of ``b`` against ``a`` by condition, on the clips that both have.

    - Error rates: a bootstrap over utterances (`error_rate.paired_test`); ``difference`` is b's
      rate less a's.
    - Hallucinated utterances: the exact sign test (McNemar's); ``flagged_a`` and ``flagged_b`` are
      counts, ``flagged_p`` is two-sided.
    - Characters a minute of non-speech: a bootstrap over clips; ``characters_difference`` and the
      other fields of `PairedTest`. Where neither wrote any text its interval is NaN, as in
      `Results.nonspeech_rates`.

    The last row, `NONSPEECH`, is over all conditions of non-speech. Raises `UserError` as
    `shared_clips`.
    """
    a, b = shared_clips(a, b)
    pairs_by_condition = _paired_rows(a, b)
    nonspeech = [
        pair for pairs in pairs_by_condition.values() for pair in pairs if pair[0].reference is None
    ]
    if nonspeech:
        pairs_by_condition[NONSPEECH] = nonspeech
    tests: dict[str, dict[str, float]] = {}
    for condition, pairs in pairs_by_condition.items():
        flags = [(x.hallucinated, y.hallucinated) for x, y in pairs]
        test: dict[str, float] = {
            "utterances": len(pairs),
            "flagged_a": sum(in_a for in_a, _ in flags),
            "flagged_b": sum(in_b for _, in_b in flags),
            "flagged_p": sign_test(flags.count((True, False)), flags.count((False, True))),
        }
        scores = a.scores(condition, rules), b.scores(condition, rules)
        if scores[0].counts.reference:
            test |= asdict(paired_test(*scores))
        if clips := [pair for pair in pairs if pair[0].reference is None]:
            test |= {f"characters_{name}": x for name, x in asdict(_nonspeech_test(clips)).items()}
        tests[condition] = test
    return tests


def sign_test(losses: int, wins: int) -> float:
    """Two-sided p-value of ``losses`` and ``wins`` under even odds; ties are left out."""
    n, k = losses + wins, min(losses, wins)
    if not n:
        return 1.0
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n)


def shared_clips(a: Results, b: Results) -> tuple[Results, Results]:
    """Both with the clips alone that both have, in a's order.

    Raises `UserError` where there are none, where keys repeat, and for a clip that is scored
    against another reference in one of them.
    """
    by_clip_a, by_clip_b = ({(r.key, r.condition): r for r in side.rows} for side in (a, b))
    if len(by_clip_a) < len(a.rows) or len(by_clip_b) < len(b.rows):
        raise UserError("two data sets hold the same keys: evaluate and compare them one by one")
    shared = [clip for clip in by_clip_a if clip in by_clip_b]
    if not shared:
        raise UserError(
            "the two systems were evaluated on other clips: evaluate both on the same data"
        )
    for clip in shared:
        if by_clip_a[clip].reference != by_clip_b[clip].reference:
            raise UserError(
                f"'{clip[0]}' has another reference in each of the two: evaluate both with the "
                "same text form and rules"
            )
    sides = by_clip_a, by_clip_b
    first, second = (Results([rows[clip] for clip in shared]) for rows in sides)
    return first, second


def _paired_rows(a: Results, b: Results) -> dict[str, list[tuple[Result, Result]]]:
    """The rows of both for each clip, by condition in a's order."""
    pairs: dict[str, list[tuple[Result, Result]]] = {name: [] for name in a.conditions()}
    for x, y in zip(a.rows, b.rows, strict=True):
        pairs[x.condition].append((x, y))
    return pairs


def _nonspeech_test(clips: Sequence[tuple[Result, Result]]) -> PairedTest:
    characters_a_N, characters_b_N = map(_characters, zip(*clips, strict=True))
    test = paired_ratio_test(characters_a_N, characters_b_N, _minutes(a for a, _ in clips))
    bounded = characters_a_N.any() or characters_b_N.any()
    return test if bounded else replace(test, low=math.nan, high=math.nan)


def _characters(rows: Iterable[Result]) -> np.ndarray:
    return np.array([count_characters(row.hypothesis) for row in rows], dtype=np.float64)


def _minutes(rows: Iterable[Result]) -> np.ndarray:
    return np.array([row.seconds for row in rows]) / 60


def _rate_row(scores: Scores) -> dict[str, float]:
    interval, counts = scores.interval(), scores.counts
    return {
        "rate": interval.value,
        "low": interval.low,
        "high": interval.high,
        "substitutions": counts.substitutions,
        "deletions": counts.deletions,
        "insertions": counts.insertions,
        "units": counts.reference,
        "utterances": len(scores),
    }
