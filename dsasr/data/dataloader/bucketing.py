"""From the lengths of a window's samples to batches: limits, length buckets, splits by budget."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import numpy as np

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
    # frames of 10 ms of one adaptor frame in the token budget: 4 · model.adaptor.stack, or with an
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
