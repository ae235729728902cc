"""Audio of any length cut at silence, read in blocks: memory does not grow with the file."""

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

from dsasr.data.audio.features import RATE, resample
from dsasr.utils.errors import UserError

FRAME = 0.01  # seconds
_FLOOR = 1e-10  # of power: -100 dB


@dataclass(frozen=True)
class SegmentationConfig:
    """All values **ours**."""

    max_seconds: float = 30.0  # no piece is longer
    pause_seconds: float = 0.5  # a silence that long ends a piece
    margin_seconds: float = 0.2  # of silence, kept on both sides
    silence_db: float = 35.0  # below the loud parts of the neighbourhood
    quiet_db: float = -60.0  # full scale is 0: what stays below this is silence anywhere

    def __post_init__(self) -> None:
        if self.max_seconds < 1 or not 0.05 <= self.pause_seconds <= self.max_seconds / 2:
            raise UserError("cutting: max_seconds ≥ 1 and 0.05 ≤ pause_seconds ≤ max_seconds / 2")


@dataclass(frozen=True)
class Piece:
    """``wave`` ([n] at 16 kHz) from second ``start`` on; ``loudness`` of its loud tenth, in dB."""

    start: float
    wave: Tensor
    loudness: float

    @property
    def seconds(self) -> float:
        return len(self.wave) / RATE


def pieces(
    source: str | Path | BinaryIO, config: SegmentationConfig | None = None
) -> Iterator[Piece]:
    """The pieces of an audio file (whatever libsndfile reads: WAV, FLAC, Ogg, Opus, MP3 …).

    Together they cover all that is not silence, in order and without overlap. Raises `UserError`
    for what is no audio; of a damaged file, after the pieces before the damage.
    """
    config = config or SegmentationConfig()
    name = str(source) if isinstance(source, (str, Path)) else "the audio"
    try:
        with soundfile.SoundFile(source) as file:
            if not 1000 <= file.samplerate <= 768_000:
                raise UserError(f"{name}: a sampling rate of {file.samplerate} Hz")
            yield from _cut(file, config, name)
    except (soundfile.LibsndfileError, RuntimeError, TypeError) as error:
        reason = getattr(error, "error_string", str(error))
        raise UserError(f"{name} cannot be read as audio: {reason}") from None


def _cut(file: soundfile.SoundFile, config: SegmentationConfig, name: str) -> Iterator[Piece]:
    rate, held, start = file.samplerate, np.zeros(0, np.float32), 0  # start: in samples
    most, over = int(config.max_seconds * rate), False
    while not over or len(held):
        while not over and len(held) <= most:
            block = file.read(frames=5 * rate, dtype="float32", always_2d=True)
            over = not len(block)
            held = np.concatenate((held, block.mean(axis=1)))
        if not np.isfinite(held).all():
            raise UserError(f"{name} holds samples that are not finite")
        low, high, used = _next(held, rate, config, over)
        if high > low:
            yield _piece(held[low:high], rate, (start + low) / rate)
        held, start = held[used:], start + used


def _piece(wave: np.ndarray, rate: int, start: float) -> Piece:
    loud = np.quantile(_power(wave, rate), 0.9)
    made = resample(torch.from_numpy(np.ascontiguousarray(wave)), rate, RATE)
    return Piece(start, made, 10 * math.log10(max(loud, _FLOOR)))


def _power(wave: np.ndarray, rate: int) -> np.ndarray:
    """Mean square of each frame of 10 ms; the last may be shorter."""
    size = max(int(FRAME * rate), 1)
    whole = len(wave) // size * size
    power = np.square(wave[:whole], dtype=np.float64).reshape(-1, size).mean(axis=1)
    if whole < len(wave):
        power = np.append(power, np.square(wave[whole:], dtype=np.float64).mean())
    return power


def _next(
    held: np.ndarray, rate: int, config: SegmentationConfig, over: bool
) -> tuple[int, int, int]:
    """The next piece's range in ``held``, and how much of it is then done with (more than 0).

    The piece ends at the first pause; without one, at the quietest place of the second half of
    ``max_seconds``, or with the file.
    """
    size = max(int(FRAME * rate), 1)
    most = int(config.max_seconds / FRAME)
    power = _power(held[: most * size], rate)
    level = np.quantile(power, 0.95) * 10 ** (-config.silence_db / 10)
    silent = power <= max(level, 10 ** (config.quiet_db / 10))
    frames = len(power)
    at_end = over and len(held) <= most * size
    speech = np.flatnonzero(~silent)
    if not len(speech):
        return 0, 0, len(held[: most * size])
    margin, pause = int(config.margin_seconds / FRAME), int(config.pause_seconds / FRAME)
    first = max(speech[0] - margin, 0)
    gaps = np.flatnonzero(np.diff(speech) > pause)
    if len(gaps):
        end = speech[gaps[0]] + 1
        stop = min(end + margin, speech[gaps[0] + 1])
        return first * size, stop * size, stop * size
    if at_end:
        stop = min(speech[-1] + 1 + margin, frames)
        return first * size, min(stop * size, len(held)), len(held)
    if first > 0:
        # Silence before it: with that gone there is room for more of it.
        return 0, 0, first * size
    smooth = np.convolve(power, np.ones(15) / 15, mode="same")
    cut = most // 2 + int(np.argmin(smooth[most // 2 : frames - 1]))
    return 0, cut * size, cut * size
