"""Where a system's errors are: its worst transcripts, confused units, and rates by group.

All of it is of recordings as they are, and counts what error rates count (`error_rate`): units of
the normalized text.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from rapidfuzz.distance import Levenshtein

from dsasr.evaluation.error_rate import EditCounts, Scores
from dsasr.evaluation.normalize import units
from dsasr.evaluation.results import Result, Results
from dsasr.evaluation.suite import CLEAN
from dsasr.utils.io import atomic_folder

CLIP_SECONDS = 20.0  # a longer recording's sound is cut
_DURATIONS = (2, 5, 10, 20)  # seconds between groups
_KINDS = {"equal": "same", "replace": "replaced", "delete": "missing", "insert": "added"}


@dataclass(frozen=True)
class Difference:
    """One unit of the reference beside one of the transcript; "" where there is none.

    ``kind``: same, replaced, missing (in the transcript) or added (to it).
    """

    kind: str
    reference: str
    hypothesis: str


@dataclass(frozen=True)
class WorstResult:
    """A result with its edits, unit by unit."""

    result: Result
    counts: EditCounts
    differences: list[Difference]


def differences(
    reference: str, hypothesis: str, lang: str, rules: str = "standard"
) -> list[Difference]:
    """A minimal edit of the reference's units into the transcript's."""
    ref, hyp = _units(reference, lang, rules), _units(hypothesis, lang, rules)
    rows = []
    for code in Levenshtein.opcodes(ref, hyp):
        left = ref[code.src_start : code.src_end]
        right = hyp[code.dest_start : code.dest_end]
        for i in range(max(len(left), len(right))):
            pair = "".join(left[i : i + 1]), "".join(right[i : i + 1])
            rows.append(Difference(_KINDS[code.tag], *pair))
    return rows


@lru_cache(maxsize=1 << 16)
def _units(text: str, lang: str, rules: str) -> tuple[str, ...]:
    """`units`, cached: a report needs the same ones several times."""
    return tuple(units(text, lang, rules))


def scored(results: Results) -> list[Result]:
    """The recordings as they are that have a reference."""
    return [row for row in results.rows if row.condition == CLEAN and row.reference]


def worst(results: Results, rules: str = "standard", count: int = 12) -> list[WorstResult]:
    """The transcripts with the most errors, of equally many those with the higher rate first."""
    rows = []
    utterances = results.scores(rules=rules).utterances
    for number, (row, score) in enumerate(zip(scored(results), utterances, strict=True)):
        counts = score.units
        if counts.errors:
            rows.append((-counts.errors, -counts.rate, number, row, counts))
    return [
        WorstResult(row, counts, differences(row.reference, row.hypothesis, row.lang, rules))
        for *_, row, counts in sorted(rows, key=lambda entry: entry[:3])[:count]
    ]


def confusions(
    results: Results, rules: str = "standard", count: int = 15
) -> list[tuple[str, str, int]]:
    """The most frequent errors: (unit of the reference, unit written, how often); "" where one side
    has none."""
    pairs: Counter[tuple[str, str]] = Counter()
    for row in scored(results):
        for edit in differences(row.reference, row.hypothesis, row.lang, rules):
            if edit.kind != "same":
                pairs[edit.reference, edit.hypothesis] += 1
    ranked = sorted(pairs.items(), key=lambda item: (-item[1], item[0]))
    return [(reference, written, times) for (reference, written), times in ranked[:count]]


def by_group(results: Results, scores: Scores, group: Callable[[Result], str]) -> dict[str, Scores]:
    """``scores`` of ``results`` as they are, split by the name that ``group`` gives; "" is in
    none."""
    groups: dict[str, Scores] = {}
    for row, utterance in zip(scored(results), scores.utterances, strict=True):
        if name := group(row):
            groups.setdefault(name, Scores(rules=scores.rules)).utterances.append(utterance)
    return groups


def duration_group(row: Result) -> str:
    """A name such as "2 to 5 s" of the range that its duration is in."""
    low = max((edge for edge in _DURATIONS if edge <= row.seconds), default=0)
    high = min((edge for edge in _DURATIONS if edge > row.seconds), default=None)
    return f"{low} s and more" if high is None else f"{low} to {high} s"


def write_clips(
    folder: Path, rows: list[WorstResult], waves: Mapping[str, np.ndarray], rate: int
) -> dict[str, str]:
    """FLAC files of the rows' sounds in ``folder``, in place of what is there; returns their names
    by key. ``waves``: float32 [n] by key, at ``rate`` Hz."""
    import soundfile

    names = {}
    with atomic_folder(folder) as staging:
        for number, key in enumerate((row.result.key for row in rows), 1):
            if key in waves and key not in names:
                names[key] = f"{number:02d}.flac"
                wave = waves[key][: round(CLIP_SECONDS * rate)]
                soundfile.write(staging / names[key], wave, rate, subtype="PCM_16")
    return names
