"""Lengths of a set's utterances, from the indexes of its shards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dsasr.data.shards.build_index import readable_index
from dsasr.data.shards.index import index_path, load_index
from dsasr.data.shards.sample import SampleFields

QUANTILES = (0.01, 0.1, 0.5, 0.9, 0.99)


@dataclass(frozen=True)
class Lengths:
    """``seconds`` [n] float32 and ``characters`` [n] int32 of utterances whose length is known."""

    seconds: np.ndarray
    characters: np.ndarray

    @classmethod
    def of_shards(cls, tars: Sequence[Path], fields: SampleFields | None = None) -> Lengths:
        """Raises `UserError` where a tar cannot be read."""
        seconds, characters = [], []
        for tar in tars:
            try:
                index = load_index(index_path(tar))
            except (OSError, ValueError):
                index = readable_index(tar, fields)
            seconds.append(index.durations)
            characters.append(index.chars)
        return cls.joined([cls(*pair) for pair in zip(seconds, characters, strict=True)])

    @classmethod
    def joined(cls, parts: Sequence[Lengths]) -> Lengths:
        empty = [cls(np.zeros(0, np.float32), np.zeros(0, np.int32))]
        parts = [*empty, *parts]
        return cls(
            np.concatenate([p.seconds for p in parts]),
            np.concatenate([p.characters for p in parts]),
        )

    def __len__(self) -> int:
        return len(self.seconds)

    @property
    def hours(self) -> float:
        return float(self.seconds.sum(dtype=np.float64)) / 3600

    @property
    def longest(self) -> float:
        """Seconds that 99.9% of the utterances do not exceed."""
        return float(np.quantile(self.seconds, 0.999)) if len(self) else 0.0

    def table(self) -> list[str]:
        """Quantiles of seconds and of characters a second, a line each."""
        if not len(self):
            return []
        heads = [f"{q:.0%}" for q in QUANTILES]
        rate = self.characters / np.maximum(self.seconds, 1e-3)
        rows = (("seconds", self.seconds), ("characters a second", rate))
        lines = [f"{'':<20}{'least':>8}" + "".join(f"{h:>8}" for h in heads) + f"{'most':>8}"]
        for name, values in rows:
            points = np.quantile(values, (0.0, *QUANTILES, 1.0))
            lines.append(f"{name:<20}" + "".join(f"{p:>8.1f}" for p in points))
        return lines
