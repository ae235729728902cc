"""Cut audio of any length into pieces to transcribe; a file is read in blocks, in bounded memory.

A piece is no longer than what the model was trained with. It ends at a pause, unless what is on one
side of it is shorter than any utterance of the training; where a longer stretch has none, at its
best short one; and where there is none of these, the next piece begins before the last one ends, so
that no word is cut in both (`dsasr.inference.joining` joins them).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, BinaryIO, Literal

import numpy as np
import soundfile
import torch
from torch import Tensor

from dsasr.data.audio.activity import FRAME, decibels, frame_power, runs
from dsasr.data.audio.files import ERRORS, AudioError, check_scale, open_audio
from dsasr.data.audio.resampling import RATE, resample
from dsasr.data.speech_statistics import SpeechStatistics
from dsasr.inference.vad import SPEECH, Vad, build_vad
from dsasr.utils import ranges
from dsasr.utils.errors import UserError
from dsasr.utils.ranges import Range

BLOCK_SECONDS = 5.0


@dataclass(frozen=True)
class SegmentationConfig:
    """How audio is cut; all values are **ours**."""

    max_seconds: Annotated[float, Range(1, 3600)] = 30.0  # no piece is longer
    # a stretch between two pauses is one piece up to this length as well
    whole_seconds: Annotated[float, Range(0, 3600)] = 0.0
    pause_seconds: float = 0.5  # a pause of this length ends a piece
    # where speech goes on longer than a piece may be, it is cut at a pause of at least this
    short_pause_seconds: float = 0.06
    # a stretch is cut at a pause of this, too, where both sides are `least_seconds` long; 0: not
    likely_pause_seconds: float = 0.0
    # of the shortest utterance: what is shorter belongs to what lies beyond a pause of up to twice
    # `pause_seconds`, or 0.3 s; 0: not known
    least_seconds: float = 0.0
    margin_seconds: float = 0.2  # of a pause, stays on both sides of a piece
    overlap_seconds: float = 1.5  # of two pieces without a pause between them
    # speech of less than this within `isolated_seconds` is a click: no word is as short
    speech_seconds: float = 0.1
    isolated_seconds: float = 0.3
    vad: Literal["auto", "silero", "energy"] = "auto"  # auto: silero where it is installed

    def __post_init__(self) -> None:
        ranges.check(self)
        if not 0.05 <= self.pause_seconds <= self.max_seconds / 2:
            raise UserError(
                "segmentation: max_seconds must be ≥ 1, and 0.05 ≤ pause_seconds ≤ max_seconds / 2"
            )

    @classmethod
    def trained_with(cls, speech: SpeechStatistics, max_seconds: float) -> SegmentationConfig:
        """Pieces like the utterances of a training: no longer than 95% of them (between two pauses:
        99.9%), cut at a pause longer than 99% of them have, and at one longer than 95% have where
        both sides are as long as an utterance. Where that is not known: up to ``max_seconds``."""
        longest, pause = speech.quantile("seconds", 0.95), speech.quantile("pause", 0.99)
        config = cls(max_seconds=max(1.0, min(longest or max_seconds, max_seconds)))
        if pause is None:
            return config
        return replace(
            config,
            pause_seconds=min(0.5, max(0.1, pause), config.max_seconds / 2),
            overlap_seconds=min(config.overlap_seconds, config.max_seconds / 3),
            # with the pauses that a piece keeps on its sides
            whole_seconds=max(config.max_seconds, speech.quantile("seconds", 0.999))
            + 2 * config.margin_seconds,
            likely_pause_seconds=max(0.08, speech.quantile("pause", 0.95) + 0.02),
            least_seconds=speech.quantile("seconds", 0.001),
        )


@dataclass(frozen=True)
class AudioSegment:
    """``wave`` is float32 [n] at 16 kHz, from second ``start`` of the file on; ``loudness`` is the
    90th percentile of its frames' power in dB of full scale. ``speech``: seconds of speech in it;
    ``overlap``: seconds at its start that the piece before it holds as well."""

    start: float
    wave: Tensor
    loudness: float
    speech: float = 0.0
    overlap: float = 0.0

    @property
    def seconds(self) -> float:
        return len(self.wave) / RATE


def split_audio(
    source: str | Path | BinaryIO,
    config: SegmentationConfig | None = None,
    channel: int | None = None,
) -> Iterator[AudioSegment]:
    """The pieces of an audio file (`dsasr.data.audio.decoding` says of which formats).

    Together they cover all speech, in order. ``channel`` takes that channel (from 0) in place of
    the mean of all. Raises `UserError` if ``source`` is no audio; of a damaged file, after the
    pieces before the damage.
    """
    config = config or SegmentationConfig()
    name = str(source) if isinstance(source, (str, Path)) else "the audio"
    try:
        with open_audio(source) as file:
            if not 1000 <= file.samplerate <= 768_000:
                raise UserError(f"{name}: a sampling rate of {file.samplerate} Hz is not supported")
            if channel is not None and not 0 <= channel < file.channels:
                raise UserError(
                    f"{name} has {file.channels} channels, counted from 0: there is no {channel}"
                )
            blocks = _read(file, name, channel)
            yield from split_blocks(blocks, file.samplerate, config)
    except AudioError as error:
        raise UserError(f"{name} cannot be read as audio: {error.detail}") from None
    except (OSError, *ERRORS) as error:
        reason = getattr(error, "error_string", getattr(error, "strerror", None) or str(error))
        raise UserError(f"{name} cannot be read as audio: {reason}") from None


def split_wave(
    wave: np.ndarray, rate: int, config: SegmentationConfig, name: str = "the audio"
) -> Iterator[AudioSegment]:
    """The pieces of samples [n] that are in memory. Raises `UserError` as `split_audio` does."""
    size = int(BLOCK_SECONDS * rate)
    blocks = (wave[start : start + size] for start in range(0, len(wave), size))
    return split_blocks(_checked(blocks, name), rate, config)


def _read(file: soundfile.SoundFile, name: str, channel: int | None) -> Iterator[np.ndarray]:
    def blocks() -> Iterator[np.ndarray]:
        while True:
            block = file.read(
                frames=int(BLOCK_SECONDS * file.samplerate), dtype="float32", always_2d=True
            )
            if not len(block):
                return
            yield block.mean(axis=1) if channel is None else block[:, channel]

    return _checked(blocks(), name)


def _checked(blocks: Iterator[np.ndarray], name: str) -> Iterator[np.ndarray]:
    """``blocks``, or `UserError` where they hold no samples, or none that are audio."""
    empty = True
    for block in blocks:
        try:
            check_scale(block)
        except AudioError as error:
            raise UserError(f"{name} holds {error.detail}") from None
        empty = False
        yield block
    if empty:
        raise UserError(f"{name} holds no audio: it has no samples")


def split_blocks(
    blocks: Iterator[np.ndarray], rate: int, config: SegmentationConfig
) -> Iterator[AudioSegment]:
    """The pieces of consecutive ``blocks`` [n] of samples at ``rate`` Hz."""
    segmenter = Segmenter(rate, config, build_vad(config.vad, rate))
    for block in blocks:
        segmenter.feed(block)
        while (segment := segmenter.next(at_end=False)) is not None:
            yield segment
    while (segment := segmenter.next(at_end=True)) is not None:
        yield segment


class Segmenter:
    """Cuts a stream of samples; it holds a piece and a block of them at most.

    All positions are frames of 10 ms from the start of the buffer.
    """

    def __init__(self, rate: int, config: SegmentationConfig, vad: Vad):
        self.rate, self.config, self.vad = rate, config, vad
        self.size = max(int(FRAME * rate), 1)  # samples of a frame
        self._wave = np.zeros(0, np.float32)
        self._speech = np.zeros(0, np.float32)
        self._power_db = np.zeros(0)
        self._start = 0  # of the buffer, in samples of the file
        self._overlap = 0  # frames at the buffer's start that the last piece had as well
        self._pending = np.zeros(0, np.float32)  # less than a frame

    def feed(self, block: np.ndarray) -> None:
        block = np.concatenate((self._pending, np.asarray(block, np.float32)))
        whole = len(block) // self.size * self.size
        self._add(block[:whole])
        self._pending = block[whole:]

    def _add(self, wave: np.ndarray) -> None:
        if len(wave):
            self._wave = np.concatenate((self._wave, wave))
            self._speech = np.concatenate((self._speech, self.vad.feed(wave)))
            power_db = decibels(frame_power(wave, self.rate))
            self._power_db = np.concatenate((self._power_db, power_db))

    def next(self, at_end: bool) -> AudioSegment | None:
        """The next piece; None where the stream must go on first, or has ended (``at_end``)."""
        if at_end and len(self._pending):
            self._add(self._pending)
            self._pending = self._pending[:0]
        while len(self._speech):
            needed = self._frames(self.config.max_seconds) + self._frames(BLOCK_SECONDS)
            if not at_end and len(self._speech) < needed:
                return None
            found = self._next_range(at_end)
            if found is None:
                continue
            return self._take(*found)
        return None

    def _frames(self, seconds: float) -> int:
        return max(1, round(seconds / FRAME))

    def _next_range(self, at_end: bool) -> tuple[int, int, int, int] | None:
        """(first frame, end, frames that are done then, overlap of the next piece); None where
        silence or a click was dropped instead."""
        cfg = self.config
        spoken = np.flatnonzero(self._speech >= SPEECH)
        margin, limit = self._frames(cfg.margin_seconds), self._frames(cfg.max_seconds)
        if not len(spoken):
            # The last frames may be the margin of what comes.
            self._drop(len(self._speech) - (0 if at_end else margin))
            return None
        first = max(int(spoken[0]) - margin, 0)
        if first > margin:
            self._drop(first)  # so that the piece may reach as far as its limit
            return None
        pause = self._frames(cfg.pause_seconds)
        edges = np.append(spoken, len(self._speech) + (pause if at_end else 0))
        gaps = np.flatnonzero(np.diff(edges) > pause)
        gaps = gaps[self._joined(edges, gaps, first + limit) :]
        end = int(spoken[gaps[0]]) + 1 if len(gaps) else len(self._speech)
        if self._is_click(spoken[spoken < end], end):
            self._drop(end)
            return None
        following = min(int(edges[gaps[0] + 1]), len(self._speech)) if len(gaps) else end
        whole = max(limit, self._frames(cfg.whole_seconds))
        if len(gaps) and end - first <= whole:
            likely = self._likely_pause(first, end)
            if likely is not None:
                return first, likely, likely, 0
            stop = min(end + margin, following, max(end, first + whole))
            return first, stop, stop, 0
        cut = self._short_pause(first, limit)
        if cut is not None:
            return first, cut, cut, 0
        overlap = min(self._frames(cfg.overlap_seconds), limit // 2)
        return first, first + limit, first + limit - overlap, overlap

    def _joined(self, edges: np.ndarray, gaps: np.ndarray, limit: int) -> int:
        """How many pauses the piece goes on over: on one side of each is less than an utterance, so
        that it lies within one. ``gaps``: indexes of the last frames of speech before pauses."""
        least = self._frames(self.config.least_seconds)
        longest = self._frames(max(2 * self.config.pause_seconds, 0.3))
        starts = edges[np.append(0, gaps + 1)]
        ends = edges[gaps] + 1
        joined = 0
        while joined + 1 < len(gaps) and ends[joined + 1] <= limit:
            between = starts[joined + 1] - ends[joined]
            shorter = min(ends[joined] - starts[0], ends[joined + 1] - starts[joined + 1])
            if between > longest or shorter >= least:
                break
            joined += 1
        return joined

    def _likely_pause(self, first: int, end: int) -> int | None:
        """The middle of the longest pause that may be one between two utterances."""
        cfg = self.config
        if not cfg.likely_pause_seconds:
            return None
        least, size = self._frames(cfg.least_seconds), self._frames(cfg.likely_pause_seconds)
        low, high = first + least, end - least
        if high <= low:
            return None
        found = [
            (b - a, a, b)
            for a, b in runs(self._speech[:end] < SPEECH)
            if b - a >= size and a >= low and b <= high
        ]
        if not found:
            return None
        _, a, b = max(found)
        return (a + b) // 2 + 1

    def _is_click(self, spoken: np.ndarray, end: int) -> bool:
        cfg = self.config
        if self._overlap or len(spoken) >= self._frames(cfg.speech_seconds):
            return False
        after = self._speech[end : end + self._frames(cfg.isolated_seconds)]
        return not (after >= SPEECH).any()

    def _short_pause(self, first: int, limit: int) -> int | None:
        """Where to cut speech that is longer than a piece: in the middle of the longest pause of
        its second half, else of what lies before; None without a pause."""
        low, high = first + self._frames(self.config.margin_seconds), first + limit
        least = self._frames(self.config.short_pause_seconds)
        silent = self._silent()[low:high]
        pauses = [(a + low, b + low) for a, b in runs(silent) if b - a >= least and a > 0]
        middle = first + limit // 2
        for candidates in ([p for p in pauses if p[1] > middle], pauses):
            # Nearly as long ones count alike: the later one leaves a longer piece.
            if candidates:
                longest = max(b - a for a, b in candidates)
                a, b = [p for p in candidates if p[1] - p[0] >= 0.8 * longest][-1]
                return min((a + b) // 2 + 1, high)
        return None

    def _silent(self) -> np.ndarray:
        """Frames without speech, or far below the speech around them."""
        speaking = self._power_db[self._speech >= SPEECH]
        level = float(np.quantile(speaking, 0.8)) - 25 if len(speaking) else -math.inf
        return (self._speech < SPEECH) | (self._power_db < level)

    def _take(self, first: int, stop: int, used: int, overlap: int) -> AudioSegment:
        wave = self._wave[first * self.size : stop * self.size]
        power_db = self._power_db[first:stop]
        resampled = resample(torch.from_numpy(np.ascontiguousarray(wave)), self.rate, RATE)
        segment = AudioSegment(
            (self._start + first * self.size) / self.rate,
            resampled,
            float(np.quantile(power_db, 0.9)) if len(power_db) else -100.0,
            float((self._speech[first:stop] >= SPEECH).sum() * FRAME),
            max(0, self._overlap - first) * FRAME,
        )
        self._drop(used)
        self._overlap = overlap
        return segment

    def _drop(self, frames: int) -> None:
        self._wave = self._wave[frames * self.size :]
        self._speech, self._power_db = self._speech[frames:], self._power_db[frames:]
        self._start += frames * self.size
        self._overlap = max(0, self._overlap - frames)
