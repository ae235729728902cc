"""Units as a CTC head would write them: a transcript's units with drawn errors (**ours**).

For text-only training (text denoising, arXiv 2601.20900): the language model learns to write text
from what the CTC head writes, mistakes included. The errors are drawn from the head's own counts
(`dsasr data confusions`), or at given rates. Equal neighbors are merged by CTC unless a blank
stands between them; a head that has learned its task writes that blank, so they stay.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from rapidfuzz.distance import Levenshtein

from dsasr.utils.errors import UserError
from dsasr.utils.io import atomic_write, to_json

FORMAT = "dsasr-confusions"
BLANK = 0


@dataclass
class Confusions:
    """How often a head wrote what: ``written_PP`` [reference unit, written unit] counts, of which
    column 0 (blank) is a deletion and row 0 what was inserted; ``gaps``: places where something
    could have been inserted (one before each reference unit, and one at the end)."""

    units: tuple[str, ...]  # the vocabulary, blank first
    written_PP: np.ndarray
    gaps: int = 0

    @classmethod
    def empty(cls, units: Sequence[str]) -> Confusions:
        return cls(tuple(units), np.zeros((len(units), len(units))))

    @classmethod
    def uniform(
        cls, units: Sequence[str], substitutions: float, deletions: float, insertions: float
    ) -> Confusions:
        """Each unit is deleted or replaced at these rates, by any other unit alike; a unit is
        inserted in a gap at the rate ``insertions``."""
        count = len(units)
        written = np.full((count, count), substitutions / max(count - 2, 1))
        written[:, BLANK] = deletions
        np.fill_diagonal(written, 1 - substitutions - deletions)
        written[BLANK] = insertions  # as often as all units together are written
        written[BLANK, BLANK] = 0.0
        return cls(tuple(units), written * 1e6, 1_000_000 * (count - 1))

    def add(self, reference: Sequence[int], written: Sequence[int]) -> None:
        """Count an utterance, by an alignment of the fewest edits."""
        self.gaps += len(reference) + 1
        matched = np.ones(len(reference), bool)
        for edit in Levenshtein.editops(list(reference), list(written)):
            if edit.tag == "insert":
                self.written_PP[BLANK, written[edit.dest_pos]] += 1
                continue
            matched[edit.src_pos] = False
            column = BLANK if edit.tag == "delete" else written[edit.dest_pos]
            self.written_PP[reference[edit.src_pos], column] += 1
        for unit in np.asarray(reference, np.int64)[matched]:
            self.written_PP[unit, unit] += 1

    @property
    def rates(self) -> dict[str, float]:
        """Substitutions, deletions and insertions, as shares of the reference's units."""
        counts = self.written_PP[1:]
        total = max(float(counts.sum()), 1.0)
        return {
            "substitutions": float(counts[:, 1:].sum() - np.trace(counts[:, 1:])) / total,
            "deletions": float(counts[:, BLANK].sum()) / total,
            "insertions": float(self.written_PP[BLANK].sum()) / total,
        }

    def save(self, path: str | Path) -> None:
        values = {
            "format": FORMAT,
            "units": list(self.units),
            "gaps": self.gaps,
            "written": self.written_PP.astype(np.int64).tolist(),
        }
        atomic_write(Path(path), to_json(values) + "\n")

    @classmethod
    def load(cls, path: str | Path, units: Sequence[str]) -> Confusions:
        """Raises `UserError` for a file that is none, or of other ``units``."""
        hint = "make it with `dsasr data confusions`"
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"data.text_only.confusions: {path}: {error}; {hint}") from None
        if not isinstance(values, dict) or values.get("format") != FORMAT:
            raise UserError(f"data.text_only.confusions: {path} is no such file; {hint}")
        try:
            counted, gaps = tuple(values["units"]), int(values["gaps"])
            written_PP = np.asarray(values["written"], float)
        except (KeyError, TypeError, ValueError):
            raise UserError(f"data.text_only.confusions: {path} is damaged; {hint}") from None
        if written_PP.shape != (len(counted), len(counted)):
            raise UserError(f"data.text_only.confusions: {path} is damaged; {hint}")
        if counted != tuple(units):
            raise UserError(
                f"data.text_only.confusions: {path} counts other units than data.phonemes has; "
                f"{hint} from a run with that vocabulary"
            )
        return cls(counted, written_PP, gaps)


@dataclass
class CtcNoise:
    """Draws what a head writes for a sequence of units, from `Confusions` smoothed by ``prior``
    counts of "written as it is" for each unit, which keeps units that were never seen."""

    confusions: Confusions
    prior: float = 1.0
    _cumulative: np.ndarray = field(init=False, repr=False)
    _inserted: np.ndarray = field(init=False, repr=False)
    _insertions: float = field(init=False, repr=False)

    def __post_init__(self) -> None:
        counts = self.confusions.written_PP.copy()
        inserted = counts[BLANK].copy()
        counts[np.diag_indices_from(counts)] += self.prior
        self._cumulative = np.cumsum(counts / counts.sum(1, keepdims=True), axis=1)
        total = inserted.sum()
        # Geometric, so that several units can be inserted in one gap.
        mean = total / max(self.confusions.gaps, 1)
        self._insertions = mean / (1 + mean)
        self._inserted = np.cumsum(inserted / total) if total else np.ones_like(inserted)

    def write(self, units: Iterable[int], rng: np.random.Generator) -> list[int]:
        """What a head writes for ``units``; empty if all of them are deleted."""
        written: list[int] = []
        for unit in units:
            self._insert(written, rng)
            column = int(np.searchsorted(self._cumulative[unit], rng.random(), side="right"))
            if column != BLANK:
                written.append(min(column, len(self._cumulative) - 1))
        self._insert(written, rng)
        return written

    def _insert(self, written: list[int], rng: np.random.Generator) -> None:
        while self._insertions and rng.random() < self._insertions:
            column = int(np.searchsorted(self._inserted, rng.random(), side="right"))
            written.append(min(max(column, 1), len(self._inserted) - 1))
