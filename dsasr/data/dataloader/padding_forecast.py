"""What a stage's batches will be, told from the shards' indexes alone: padding, fill, positions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from dsasr.data.dataloader.bucketing import (
    FRAMES_PER_SECOND,
    BatchConfig,
    Lengths,
    Part,
    PlanConfig,
)
from dsasr.data.dataloader.sampler import BatchSampler
from dsasr.data.shards.index import ShardIndex

PERCENTILE = 99.0  # of batches whose language-model positions fit the forecast's share of frames


@dataclass(frozen=True)
class Forecast:
    """One epoch's batches. Shares are of padded frames or positions; lengths in frames."""

    samples: int
    batches: int
    hours: float  # after augmentation
    padding: float  # share of frames that are padding
    text_padding: float  # share of the positions of unpacked rows that are padding
    fill: float  # mean of a batch's frames, padding included, over the budget
    shortest: int  # the 1st percentile of samples' frames
    longest: int
    positions_per_frame: float  # of nearly all batches, padding included
    left_out: Counter[str]  # cause → samples


def forecast(
    parts: Sequence[Part],
    config: PlanConfig,
    load: Callable[[str], ShardIndex],
    lengths: Lengths | None = None,
    most_shards: int = 0,
) -> Forecast:
    """Plan one epoch of ``parts`` (of up to ``most_shards`` shards each, evenly chosen; 0: all)."""
    chosen = [_thinned(part, most_shards) for part in parts]
    planner = BatchSampler(chosen, replace(config, epochs=1), load, lengths=lengths)
    rows: list[tuple[int, int, int, int, int]] = []  # samples, frames, longest, positions, most
    all_frames: list[np.ndarray] = []
    left_out: Counter[str] = Counter()
    try:
        for task in planner:
            left_out.update(cause for cause, *_ in task.bad)
            if not task.samples:
                continue
            frames = np.array([s.frames for s in task.samples], np.int64)
            chars = np.array([s.entry.chars for s in task.samples], np.int64)
            positions = config.batch.positions(frames, chars)
            sizes = (frames.sum(), frames.max(), positions.sum(), positions.max())
            rows.append((len(frames), *map(int, sizes)))
            all_frames.append(frames)
    finally:
        planner.close()
    return _summary(np.array(rows, np.int64).reshape(-1, 5), all_frames, config.batch, left_out)


def _thinned(part: Part, most: int) -> Part:
    if not most or len(part.shards) <= most:
        return part
    chosen = np.linspace(0, len(part.shards) - 1, most).astype(int).tolist()
    counts = None if part.counts is None else np.asarray(part.counts)[chosen]
    return replace(part, shards=[part.shards[i] for i in chosen], counts=counts)


def _summary(
    rows: np.ndarray, all_frames: list[np.ndarray], batch: BatchConfig, left_out: Counter[str]
) -> Forecast:
    counts, frames, longest, positions, most = rows.T
    padded, spread = counts * longest, counts * most
    lengths = np.concatenate(all_frames) if all_frames else np.zeros(1, np.int64)
    ratios = spread / np.maximum(padded, 1)
    return Forecast(
        samples=int(counts.sum()),
        batches=len(rows),
        hours=float(frames.sum()) / FRAMES_PER_SECOND / 3600,
        padding=1 - float(frames.sum()) / max(float(padded.sum()), 1.0),
        text_padding=1 - float(positions.sum()) / max(float(spread.sum()), 1.0),
        fill=float(padded.mean()) / batch.frames if len(rows) else 0.0,
        shortest=int(np.percentile(lengths, 1)),
        longest=int(lengths.max()),
        positions_per_frame=float(np.percentile(ratios, PERCENTILE)) if len(rows) else 0.0,
        left_out=left_out,
    )
