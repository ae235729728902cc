"""Which samples make up which batch: a pure function of (seed, epoch, dataset).

The epoch's shards are permuted and taken in windows. A window's indexes are loaded (the next
window's by a background thread), every sample's length after augmentation is computed, the samples
are bucketed by length and split into batches within the budgets, and the batches are shuffled.
Neither the world size nor the number of workers enters, so a cursor (epoch, window, batch) and a
count per dataset resume the run anywhere, on any number of ranks (`dsasr.data.dataloader.sampler`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from dsasr.data.dataloader.bucketing import (
    FRAMES_PER_SECOND,
    LIMITS,
    BatchConfig,
    bucket_order,
    exceeded_limits,
    split_into_batches,
)
from dsasr.data.shards.urls import shard_name

if TYPE_CHECKING:
    from dsasr.data.shards.index import ShardIndex
    from dsasr.data.shards.sample import DroppedSample, Entry


@dataclass(frozen=True)
class DatasetPart:
    """One component of the mixture: a dataset, or one language of it."""

    name: str
    shards: Sequence[str]  # URLs or paths; their basenames identify them
    counts: np.ndarray | None = None  # samples of each shard, if dataset.json lists them
    lang: str | None = None
    weight: float = 1.0
    reports: bool = True  # reports the shards' bad samples: one of the parts that share shards
    sizes: np.ndarray | None = None  # bytes of the shards, or of some of them, if they are known

    def fingerprint(self) -> str:
        """Identity of the shard list; independent of where the shards lie."""
        digest = hashlib.blake2b(digest_size=8)
        for shard in self.shards:
            digest.update(shard_name(shard).encode() + b"\n")
        if self.counts is not None:
            digest.update(np.asarray(self.counts, np.int64).tobytes())
        digest.update((self.lang or "").encode())
        return digest.hexdigest()

    def content(self) -> str:
        """Distinguishes shards that were packed again under the same names; "" if nothing does."""
        if self.sizes is None or not self.sizes.any():
            return ""
        return hashlib.blake2b(self.sizes.tobytes(), digest_size=8).hexdigest()


class PlannedSample(NamedTuple):
    """One sample of a batch: its location, its seed, and its planned number of frames.

    ``plain``: it is not augmented, because augmented it would exceed a limit.
    """

    shard: str
    entry: Entry
    seed: int
    frames: int
    plain: bool = False


@dataclass(frozen=True)
class Task:
    """One rank's batch, planned before any audio is read.

    A task without samples fills up the last step, or only reports ``bad``.
    """

    number: int
    epoch: int
    dataset: str
    seed: int
    samples: tuple[PlannedSample, ...]
    bad: tuple[DroppedSample, ...] = ()

    def describe(self) -> str:
        keys = ", ".join(f"{s.entry.key} ({s.shard})" for s in self.samples)
        return f"batch {self.number} of '{self.dataset}': {keys}"


@dataclass
class Window:
    """A planned window of N samples in the order of its batches."""

    shards: list[str]
    indexes: list[ShardIndex]  # of the shards
    slots: np.ndarray  # [N]: sample i is in shard ``shards[slots[i]]``,
    rows: np.ndarray  # [N]: where it is row ``rows[i]`` of the index
    seeds: np.ndarray  # [N]: `sample_seeds`
    frames: np.ndarray  # [N]: planned feature frames, after augmentation
    plain: np.ndarray  # [N] bool: not augmented (`PlannedSample`)
    ranges: np.ndarray  # [batches, 2]: first and last + 1 of each batch
    bad: list[DroppedSample] = field(default_factory=list)

    def __len__(self) -> int:
        # A window whose samples are all dropped reports them in one batch without samples.
        return max(len(self.ranges), int(bool(self.bad)))

    def samples(self, batch: int) -> tuple[PlannedSample, ...]:
        if batch >= len(self.ranges):
            return ()
        first, last = self.ranges[batch].tolist()
        return tuple(
            PlannedSample(self.shards[slot], self.indexes[slot].entry(row), seed, frames, plain)
            for slot, row, seed, frames, plain in zip(
                self.slots[first:last].tolist(),
                self.rows[first:last].tolist(),
                self.seeds[first:last].tolist(),
                self.frames[first:last].tolist(),
                self.plain[first:last].tolist(),
                strict=True,
            )
        )


def stable_hash(*parts: object) -> int:
    """63 bits that depend on the parts' JSON only: the same in every process and release."""
    text = json.dumps(parts, ensure_ascii=True).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


def splitmix64(values: np.ndarray) -> np.ndarray:
    """The splitmix64 finalizer (Steele, Lea and Flood 2014) of a uint64 array."""
    with np.errstate(over="ignore"):
        z = values + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def sample_seeds(
    seed: int, epoch: int, dataset: str, shard: str, keys: Sequence[str]
) -> np.ndarray:
    """One 63-bit seed for each key of a shard: from (seed, epoch, dataset, shard's name, key).

    A sample's seed depends on no other sample, so neither a bad neighbor nor one that is missing
    from the index changes it.
    """
    base = stable_hash("sample", seed, epoch, dataset, shard_name(shard))
    digests = (
        hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        for key in keys
    )
    hashed = np.frombuffer(b"".join(digests), "<u8")
    return splitmix64(np.uint64(base) ^ splitmix64(hashed)) >> np.uint64(1)


def uniform(seeds: np.ndarray, salt: int) -> np.ndarray:
    """One float64 in [0, 1) for each seed; different salts give independent draws."""
    mixed = splitmix64(seeds ^ splitmix64(np.full(1, salt, np.uint64)))
    return (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53


AugmentedDurations = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""(durations [N] in seconds, seeds [N]) → durations after augmentation."""


@dataclass(frozen=True)
class PlanConfig:
    """What shapes the plan besides the data; part of the state's identity."""

    batch: BatchConfig = field(default_factory=BatchConfig)
    seed: int = 0
    shuffle: bool = True
    epochs: int = 0  # 0: endless
    window: int = 16  # shards, at least
    window_samples: int = 8192  # samples, at least, if dataset.json lists the counts


def plan_window(
    part: DatasetPart,
    epoch: int,
    number: int,
    shards: list[str],
    indexes: list[ShardIndex],
    config: PlanConfig,
    lengths: AugmentedDurations | None,
) -> Window:
    """Plan one window from its shards' indexes. Pure: equal arguments, equal plans."""
    columns: list[tuple[np.ndarray, ...]] = []
    bad: list[DroppedSample] = []
    for slot, (shard, index) in enumerate(zip(shards, indexes, strict=True)):
        keep = np.arange(len(index))
        if part.lang is not None:
            keep = np.flatnonzero(index.lang_mask(part.lang))
        seeds = sample_seeds(config.seed, epoch, part.name, shard, index.keys)[keep]
        chars = index.chars[keep].astype(np.int64)
        seconds = index.durations[keep].astype(np.float64)
        exceeded = exceeded_limits(seconds, chars, config.batch)
        plain = np.zeros(len(keep), bool)
        if lengths is not None:
            # Where augmentation would exceed a limit, it is left out, rather than the sample.
            augmented = lengths(seconds, seeds)
            plain = exceeded_limits(augmented, chars, config.batch) != 0
            seconds = np.where(plain, seconds, augmented)
        if part.reports:
            bad += [(b.cause, shard, b.key, b.detail) for b in index.bad]
        for i in np.flatnonzero(exceeded).tolist():
            entry, cause = index.entry(int(keep[i])), LIMITS[int(exceeded[i])]
            detail = f"{entry.duration:.2f} s, {entry.chars} characters"
            detail += config.batch.limit_of(cause)
            bad.append((cause, shard, entry.key, detail))
        frames = np.ceil(seconds * FRAMES_PER_SECOND).astype(np.int64)
        good = exceeded == 0
        slots = np.full(len(keep), slot)
        columns.append(tuple(c[good] for c in (slots, keep, seeds, frames, plain, chars)))
    slots_n, rows_n, seeds_n, frames_n, plain_n, chars_n = map(
        np.concatenate, zip(*columns, strict=True)
    )
    rng = None
    if config.shuffle:
        rng = np.random.default_rng(stable_hash("window", config.seed, part.name, epoch, number))
    order = bucket_order(frames_n, chars_n, config.batch.bucket, rng)
    ranges = split_into_batches(frames_n[order], chars_n[order], config.batch)
    if rng is not None:
        rng.shuffle(ranges)
    return Window(
        shards=shards,
        indexes=indexes,
        slots=slots_n[order].astype(np.int32),
        rows=rows_n[order].astype(np.int32),
        seeds=seeds_n[order],
        frames=frames_n[order],
        plain=plain_n[order],
        ranges=ranges,
        bad=bad,
    )
