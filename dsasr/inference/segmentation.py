"""Split audio of any length at silence; a file is read in blocks, in bounded memory."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import soundfile
import torch
from torch import Tensor

from dsasr.data.audio.files import ERRORS, AudioError, check_scale, open_audio
from dsasr.data.audio.resampling import RATE, resample
from dsasr.utils.errors import UserError

FRAME = 0.01  # seconds
_FLOOR = 1e-10  # of power: -100 dB


@dataclass(frozen=True)
class SegmentationConfig:
    """How audio is split; all values are **ours**."""

    max_seconds: float = 30.0  # no segment is longer
    pause_seconds: float = 0.5  # a silence of this length ends a segment
    margin_seconds: float = 0.2  # silence that stays on both sides of a segment
    silence_db: float = 35.0  # a frame this far below the loud frames around it is silent
    quiet_db: float = -60.0  # of full scale; a frame below this is silent anyway

    def __post_init__(self) -> None:
        if self.max_seconds < 1 or not 0.05 <= self.pause_seconds <= self.max_seconds / 2:
            raise UserError(
                "segmentation: max_seconds must be ≥ 1, and 0.05 ≤ pause_seconds ≤ max_seconds / 2"
            )


@dataclass(frozen=True)
class AudioSegment:
    """``wave`` is float32 [n] at 16 kHz, from second ``start`` of the file on; ``loudness`` is the
    90th percentile of its frames' power in dB of full scale."""

    start: float
    wave: Tensor
    loudness: float

    @property
    def seconds(self) -> float:
        return len(self.wave) / RATE


def split_audio(
    source: str | Path | BinaryIO, config: SegmentationConfig | None = None
) -> Iterator[AudioSegment]:
    """The segments of an audio file (`dsasr.data.audio.decoding` says of which formats).

    Together they cover all that is not silence, in order and without overlap. Raises `UserError`
    if ``source`` is no audio; of a damaged file, after the segments before the damage.
    """
    config = config or SegmentationConfig()
    name = str(source) if isinstance(source, (str, Path)) else "the audio"
    try:
        with open_audio(source) as file:
            if not 1000 <= file.samplerate <= 768_000:
                raise UserError(f"{name}: a sampling rate of {file.samplerate} Hz is not supported")
            yield from _split(file, config, name)
    except AudioError as error:
        raise UserError(f"{name} cannot be read as audio: {error.detail}") from None
    except (OSError, *ERRORS) as error:
        reason = getattr(error, "error_string", getattr(error, "strerror", None) or str(error))
        raise UserError(f"{name} cannot be read as audio: {reason}") from None


def _split(
    file: soundfile.SoundFile, config: SegmentationConfig, name: str
) -> Iterator[AudioSegment]:
    rate, buffer, start = file.samplerate, np.zeros(0, np.float32), 0  # start: in samples
    limit, at_end = int(config.max_seconds * rate), False
    while not at_end or len(buffer):
        while not at_end and len(buffer) <= limit:
            block = file.read(frames=5 * rate, dtype="float32", always_2d=True)
            at_end = not len(block)
            buffer = np.concatenate((buffer, block.mean(axis=1)))
        if not len(buffer):
            if not start:
                raise UserError(f"{name} holds no audio: it has no samples")
            return
        try:
            check_scale(buffer)
        except AudioError as error:
            raise UserError(f"{name} holds {error.detail}") from None
        low, high, used = _next_range(buffer, rate, config, at_end)
        if high > low:
            yield _segment(buffer[low:high], rate, (start + low) / rate)
        buffer, start = buffer[used:], start + used


def _segment(wave: np.ndarray, rate: int, start: float) -> AudioSegment:
    loud = np.quantile(_power(wave, rate), 0.9)
    resampled = resample(torch.from_numpy(np.ascontiguousarray(wave)), rate, RATE)
    return AudioSegment(start, resampled, 10 * math.log10(max(loud, _FLOOR)))


def _power(wave: np.ndarray, rate: int) -> np.ndarray:
    """Mean square of each frame of 10 ms; the last may be shorter."""
    size = max(int(FRAME * rate), 1)
    whole = len(wave) // size * size
    power = np.square(wave[:whole], dtype=np.float64).reshape(-1, size).mean(axis=1)
    if whole < len(wave):
        power = np.append(power, np.square(wave[whole:], dtype=np.float64).mean())
    return power


def _next_range(
    buffer: np.ndarray, rate: int, config: SegmentationConfig, at_end: bool
) -> tuple[int, int, int]:
    """The next segment's range of samples in ``buffer``, and how many samples are done then (> 0).

    The segment ends at the first pause; without one, at the quietest frame of the second half of
    ``max_seconds``, or with the file if ``buffer`` is its rest (``at_end``).
    """
    size = max(int(FRAME * rate), 1)
    longest = int(config.max_seconds / FRAME)
    power = _power(buffer[: longest * size], rate)
    level = np.quantile(power, 0.95) * 10 ** (-config.silence_db / 10)
    silent = power <= max(level, 10 ** (config.quiet_db / 10))
    frames = len(power)
    speech = np.flatnonzero(~silent)
    if not len(speech):
        return 0, 0, len(buffer[: longest * size])
    margin, pause = int(config.margin_seconds / FRAME), int(config.pause_seconds / FRAME)
    first = max(speech[0] - margin, 0)
    gaps = np.flatnonzero(np.diff(speech) > pause)
    if len(gaps):
        end = speech[gaps[0]] + 1
        stop = min(end + margin, speech[gaps[0] + 1])
        return first * size, stop * size, stop * size
    if at_end and len(buffer) <= longest * size:
        stop = min(speech[-1] + 1 + margin, frames)
        return first * size, min(stop * size, len(buffer)), len(buffer)
    if first > 0:
        # Drop the silence before the speech first: the segment may then reach further.
        return 0, 0, first * size
    smooth = np.convolve(power, np.ones(15) / 15, mode="same")
    stop = longest // 2 + int(np.argmin(smooth[longest // 2 : frames - 1]))
    return 0, stop * size, stop * size
