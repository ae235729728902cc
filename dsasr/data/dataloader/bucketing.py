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
from typing import TYPE_CHECKING, Annotated

import numpy as np

from dsasr.data.shards.urls import shard_name
from dsasr.utils import ranges
from dsasr.utils.errors import UserError
from dsasr.utils.ranges import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Range,
    Share,
)

if TYPE_CHECKING:
    from dsasr.data.shards.index import DroppedSample, Entry, ShardIndex

FRAMES_PER_SECOND = 100
# Samples of the largest window that is split for the least padding, at 10 µs a sample.
LEAST_PADDING_UP_TO = 2048
# The cost of a batch, as a share of the budget: the padding that one batch fewer is worth. The
# highest cost whose padding stays within the goal is used, else the lowest.
BATCH_COSTS = (0.15, 0.08, 0.04, 0.02)
PADDING_GOAL = 0.027


@dataclass(frozen=True)
class BatchConfig:
    """What fits into one batch. Budgets count padding; 0 turns one off (not ``frames``).

    ``tokens`` bounds the language model's positions: samples x (``prompt_tokens`` + speech +
    transcript), speech at one token for ``frames_per_token`` feature frames, the transcript
    estimated as characters x ``tokens_per_char`` (1 is an upper bound for most alphabets).
    """

    # feature frames (10 ms) of a micro-batch of a rank, padding included
    frames: PositiveInt = 12_000
    # positions of the language model in a micro-batch, padding included; 0: no such budget
    tokens: NonNegativeInt = 0
    samples: PositiveInt = 256  # samples of a micro-batch, at most
    # relative width of a length bucket, 0 to 1; about half of it becomes padding. 1: all lengths
    # together in random order
    bucket: Share = 0.02
    # longer transcripts are dropped, counted as too_much_text
    max_chars: PositiveInt = 10_000
    # transcripts with more characters a second of audio, and 20 more, are dropped likewise: fast
    # speech has 30
    max_chars_per_second: PositiveFloat = 60.0
    min_seconds: NonNegativeFloat = 0.1  # shorter samples are dropped, counted as too_short
    # longer samples are dropped, counted as too_long
    max_seconds: Annotated[float, Range(0, 86_400, above=True)] = 40.0
    # tokens of the prompt that the token budget counts for each sample
    prompt_tokens: NonNegativeInt = 40
    # frames of 10 ms of one speech token in the token budget: 4 · model.adaptor.stack, or with an
    # encoder of 50 Hz, as Whisper's, 2 · model.adaptor.stack
    frames_per_token: PositiveInt = 16
    # tokens of a transcript's character in the token budget; 1 is an upper bound for most alphabets
    tokens_per_char: PositiveFloat = 1.0

    def __post_init__(self) -> None:
        ranges.check(self)
        if self.max_seconds <= self.min_seconds:
            raise UserError("batch.max_seconds must be larger than batch.min_seconds")

    def limit_of(self, cause: str) -> str:
        """The end of a dropped sample's detail: the limit that it exceeds, with its key."""
        if cause == "too_long":
            return f"; at most {self.max_seconds:g} s (batch.max_seconds)"
        if cause == "too_short":
            return f"; at least {self.min_seconds:g} s (batch.min_seconds)"
        if cause == "too_much_text":
            rate = f"{self.max_chars_per_second:g} a second (batch.max_chars_per_second)"
            return f"; at most {rate} and {self.max_chars:,} (batch.max_chars)"
        if cause == "over_budget":
            tokens = f" and {self.tokens:,} tokens (batch.tokens)" if self.tokens else ""
            return f"; at most {self.frames:,} frames of 10 ms (batch.frames){tokens}"
        return ""

    def most_chars(self, seconds: np.ndarray | float) -> np.ndarray:
        """The longest transcript that audio of ``seconds`` may have, in characters."""
        return np.minimum(self.max_chars_per_second * np.asarray(seconds) + 20, self.max_chars)

    def positions(self, frames: np.ndarray, chars: np.ndarray) -> np.ndarray:
        """Positions of the language model: prompt, speech, transcript and end token."""
        speech = -(-frames // self.frames_per_token)
        transcript = np.ceil(chars * self.tokens_per_char).astype(np.int64)
        return self.prompt_tokens + speech.astype(np.int64) + transcript + 1


@dataclass(frozen=True)
class DatasetPart:
    """One component of the mixture: a dataset, or one language of it."""

    name: str
    shards: Sequence[str]  # URLs or paths; their basenames identify them
    counts: np.ndarray | None = None  # samples of each shard, if dataset.json lists them
    lang: str | None = None
    weight: float = 1.0
    reports: bool = True  # reports the shards' bad samples: one of the parts that share shards

    def fingerprint(self) -> str:
        """Identity of the shard list; independent of where the shards lie."""
        digest = hashlib.blake2b(digest_size=8)
        for shard in self.shards:
            digest.update(shard_name(shard).encode() + b"\n")
        if self.counts is not None:
            digest.update(np.asarray(self.counts, np.int64).tobytes())
        digest.update((self.lang or "").encode())
        return digest.hexdigest()


@dataclass(frozen=True)
class PlannedSample:
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
    """A planned window: sample i of the batch order is row ``rows[i]`` of shard ``slots[i]``."""

    shards: list[str]
    indexes: list[ShardIndex]
    slots: np.ndarray
    rows: np.ndarray
    seeds: np.ndarray
    frames: np.ndarray
    plain: np.ndarray
    ranges: np.ndarray  # [batches, 2]: first and last+1 of each batch
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


def bucket_order(
    frames: np.ndarray, chars: np.ndarray, width: float, rng: np.random.Generator | None
) -> np.ndarray:
    """Order in which neighbors have similar length, and within a length bucket similar text.

    Buckets are geometric, ``width`` wide, their edges shifted at random; texts run up in one
    bucket and down in the next, so that a batch across an edge stays even. Text lengths are
    jittered by a quarter so that short epochs do not repeat their batches. Of ``width`` 1 there is
    one bucket, in random order.
    """
    if width == 1:
        return np.arange(len(frames)) if rng is None else rng.permutation(len(frames))
    shift = rng.random() if rng is not None else 0.0
    if width > 0:
        bins = np.floor(np.log(np.maximum(frames, 1)) / np.log1p(width) + shift).astype(np.int64)
    else:
        bins = frames.astype(np.int64)
    texts = np.log1p(chars.astype(np.float64))
    if rng is not None:
        texts = texts + 0.25 * rng.random(len(texts))
    return np.lexsort((np.where(bins & 1, -texts, texts), bins))


def split_into_batches(frames: np.ndarray, chars: np.ndarray, config: BatchConfig) -> np.ndarray:
    """Ranges [batches, 2] (first, last + 1) of consecutive samples, each within every budget.

    Small windows, whose few batches span wide ranges of length, are split for the least padding
    (`_split_for_least_padding`); large ones, and those in random order, greedily.
    """
    tokens = config.positions(frames, chars)
    ranges: list[tuple[int, int]] = []
    if len(frames) > LEAST_PADDING_UP_TO or config.bucket == 1:
        ranges = _split_greedily(frames, tokens, config)
    elif len(frames):
        goal = max(PADDING_GOAL, config.bucket / 2)
        spans = _spans(frames, tokens, config)
        for cost in BATCH_COSTS:
            ranges = _split_for_least_padding(spans, cost * config.frames)
            padded = sum((last - first) * frames[first:last].max() for first, last in ranges)
            if frames.sum() >= (1 - goal) * padded:
                break
    return np.asarray(ranges, np.int64).reshape(-1, 2)


def _split_greedily(
    frames: np.ndarray, tokens: np.ndarray, config: BatchConfig
) -> list[tuple[int, int]]:
    """Each batch takes samples as long as the budgets allow."""
    budget = config.tokens or np.iinfo(np.int64).max
    ranges: list[tuple[int, int]] = []
    first = widest = longest = 0
    for i, (f, t) in enumerate(zip(frames.tolist(), tokens.tolist(), strict=True)):
        wide, long, count = max(widest, f), max(longest, t), i - first + 1
        over = count * wide > config.frames or count * long > budget or count > config.samples
        if over and i > first:
            ranges.append((first, i))
            first, wide, long = i, f, t
        widest, longest = wide, long
    if len(frames):
        ranges.append((first, len(frames)))
    return ranges


def _spans(frames: np.ndarray, tokens: np.ndarray, config: BatchConfig) -> np.ndarray:
    """[N, size] padded frames of the batch from sample i − size + 1 + j to sample i.

    ``size`` is the largest batch; inf where a batch exceeds a budget. A single sample always fits.
    A batch that would start before the first sample is counted as if it had samples there.
    """
    count = len(frames)
    size = min(config.samples, count, max(config.frames // max(int(frames.min()), 1), 1))
    sizes = np.arange(size, 0, -1)

    def padded(lengths: np.ndarray) -> np.ndarray:
        rows = np.lib.stride_tricks.sliding_window_view(np.pad(lengths, (size - 1, 0)), size)
        return np.maximum.accumulate(rows[:, ::-1], axis=1)[:, ::-1] * sizes

    spans = padded(frames).astype(np.float64)
    over = spans > config.frames
    if config.tokens:
        over |= padded(tokens) > config.tokens
    over[:, -1] = False
    spans[over] = np.inf
    return spans


def _split_for_least_padding(spans: np.ndarray, cost: float) -> list[tuple[int, int]]:
    """The split that minimizes padded frames + ``cost`` per batch, as a shortest path.

    ``spans`` [N, size]: `_spans`.
    """
    count, size = spans.shape
    # The least cost of the samples before i is at i + size − 1.
    least = np.full(size + count, np.inf)
    least[size - 1] = 0.0
    first_of = []  # of the batch that ends with each sample, on the shortest path to it
    for i in range(count):
        candidates = least[i : i + size] + spans[i]
        candidates += cost
        best = int(candidates.argmin())
        least[i + size] = candidates[best]
        first_of.append(i - size + 1 + best)
    ranges, last = [], count
    while last:
        ranges.append((first_of[last - 1], last))
        last = first_of[last - 1]
    return ranges[::-1]


@dataclass(frozen=True)
class PlanConfig:
    """What shapes the plan besides the data; part of the state's identity."""

    batch: BatchConfig = field(default_factory=BatchConfig)
    seed: int = 0
    shuffle: bool = True
    epochs: int = 0  # 0: endless
    window: int = 16  # shards, at least
    window_samples: int = 8192  # samples, at least, if dataset.json lists the counts


def exceeded_limits(seconds: np.ndarray, chars: np.ndarray, config: BatchConfig) -> np.ndarray:
    """[N] 0 where a sample is within all limits, else a key of `LIMITS`."""
    frames = np.ceil(seconds * FRAMES_PER_SECOND)
    exceeded = np.zeros(len(seconds), np.int8)
    exceeded[frames > config.frames] = 3
    if config.tokens:
        exceeded[config.positions(frames, chars) > config.tokens] = 3
    exceeded[chars > config.most_chars(seconds)] = 5
    exceeded[seconds > config.max_seconds] = 2
    exceeded[seconds < config.min_seconds] = 1
    exceeded[seconds <= 0] = 4
    return exceeded


LIMITS = {1: "too_short", 2: "too_long", 3: "over_budget", 4: "no_duration", 5: "too_much_text"}


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
