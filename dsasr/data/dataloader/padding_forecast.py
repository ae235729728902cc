"""Forecast of a stage's batches from the shards' indexes alone: padding, fill, positions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from dsasr.data.dataloader.bucketing import FRAMES_PER_SECOND, BatchConfig
from dsasr.data.dataloader.sampler import BatchSampler
from dsasr.data.dataloader.window_plan import AugmentedDurations, DatasetPart, PlanConfig
from dsasr.data.shards.index import ShardIndex

PERCENTILE = 99.0  # of the batches' language-model positions per frame


@dataclass(frozen=True)
class Forecast:
    """One epoch's batches; lengths in frames."""

    samples: int
    batches: int
    hours: float  # after augmentation
    padding: float  # share of frames that are padding
    fill: float  # mean of a batch's frames, padding included, over the budget
    shortest: int  # the 1st percentile of samples' frames
    longest: int
    positions_per_frame: float  # `PERCENTILE` over batches, padding included
    left_out: Counter[str]  # cause → samples


def forecast(
    parts: Sequence[DatasetPart],
    config: PlanConfig,
    load: Callable[[str], ShardIndex],
    lengths: AugmentedDurations | None = None,
    max_shards: int = 0,
) -> Forecast:
    """Plan one epoch of ``parts`` (of up to ``max_shards`` evenly spread shards each; 0: all)."""
    subset = [_limit_shards(part, max_shards) for part in parts]
    sampler = BatchSampler(subset, replace(config, epochs=1), load, lengths=lengths)
    # samples, frames, longest sample's frames, most positions of a sample
    rows: list[tuple[int, int, int, int]] = []
    all_frames: list[np.ndarray] = []
    left_out: Counter[str] = Counter()
    try:
        for task in sampler:
            left_out.update(cause for cause, *_ in task.bad)
            if not task.samples:
                continue
            frames = np.array([s.frames for s in task.samples], np.int64)
            chars = np.array([s.entry.chars for s in task.samples], np.int64)
            positions = config.batch.positions(frames, chars)
            sizes = (frames.sum(), frames.max(), positions.max())
            rows.append((len(frames), *map(int, sizes)))
            all_frames.append(frames)
    finally:
        sampler.close()
    return _summary(np.array(rows, np.int64).reshape(-1, 4), all_frames, config.batch, left_out)


def _limit_shards(part: DatasetPart, limit: int) -> DatasetPart:
    if not limit or len(part.shards) <= limit:
        return part
    spread = np.linspace(0, len(part.shards) - 1, limit).astype(int).tolist()
    counts = None if part.counts is None else np.asarray(part.counts)[spread]
    return replace(part, shards=[part.shards[i] for i in spread], counts=counts)


def _summary(
    rows: np.ndarray, all_frames: list[np.ndarray], batch: BatchConfig, left_out: Counter[str]
) -> Forecast:
    counts, frames, longest, most_positions = rows.T
    padded, padded_positions = counts * longest, counts * most_positions
    lengths = np.concatenate(all_frames) if all_frames else np.zeros(1, np.int64)
    ratios = padded_positions / np.maximum(padded, 1)
    return Forecast(
        samples=int(counts.sum()),
        batches=len(rows),
        hours=float(frames.sum()) / FRAMES_PER_SECOND / 3600,
        padding=1 - float(frames.sum()) / max(float(padded.sum()), 1.0),
        fill=float(padded.mean()) / batch.frames if len(rows) else 0.0,
        shortest=int(np.percentile(lengths, 1)),
        longest=int(lengths.max()),
        positions_per_frame=float(np.percentile(ratios, PERCENTILE)) if len(rows) else 0.0,
        left_out=left_out,
    )
