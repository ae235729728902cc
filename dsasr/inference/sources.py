"""What can be transcribed: paths, open files, encoded bytes, and samples in memory."""

from __future__ import annotations

import io
import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch

from dsasr.data.audio.files import AudioError, check_whole
from dsasr.data.audio.resampling import RATE
from dsasr.inference.segmentation import AudioSegment, SegmentationConfig, split_audio, split_wave
from dsasr.utils.errors import UserError


class Samples(NamedTuple):
    """Audio in memory: ``wave`` [n] or [n, channels], a numpy array or a tensor of floats with full
    scale 1, or of 16-bit integers; ``rate`` in Hz."""

    wave: np.ndarray | torch.Tensor
    rate: int = RATE
    name: str = "the audio"


Source = str | Path | BinaryIO | bytes | np.ndarray | torch.Tensor | Samples


def name_of(source: Source) -> str:
    """The path, a name that samples were given, or ``-``."""
    if isinstance(source, Samples):
        return source.name
    return str(source) if isinstance(source, (str, Path)) else "-"


def split_source(
    source: Source, config: SegmentationConfig, channel: int | None = None
) -> Iterator[AudioSegment]:
    """The pieces of ``source``; samples without a rate are at 16 kHz. Raises `UserError`."""
    if isinstance(source, (np.ndarray, torch.Tensor)):
        source = Samples(source)
    if isinstance(source, Samples):
        return split_wave(_mono(source, channel), source.rate, config, source.name)
    if isinstance(source, bytes):
        source = io.BytesIO(source)
    if not isinstance(source, (str, Path)) and not hasattr(source, "read"):
        raise UserError(
            f"a {type(source).__name__} is no recording: give a path, an open file, encoded bytes, "
            "or samples as an array or a tensor"
        )
    return split_audio(source, config, channel)


def _mono(samples: Samples, channel: int | None) -> np.ndarray:
    wave, name = samples.wave, samples.name
    if isinstance(wave, torch.Tensor):
        wave = wave.detach().cpu().numpy()
    wave = np.asarray(wave)
    if not 1000 <= samples.rate <= 768_000:
        raise UserError(f"{name}: a sampling rate of {samples.rate} Hz is not supported")
    if wave.ndim not in (1, 2) or wave.dtype.kind not in "fi":
        raise UserError(
            f"{name}: give samples [n] or [n, channels] of floats or 16-bit integers, not "
            f"{wave.dtype} of shape {list(wave.shape)}"
        )
    if wave.dtype.kind == "i":
        wave = wave.astype(np.float32) / float(np.iinfo(wave.dtype).max + 1)
    if wave.ndim == 2 and wave.shape[1] > wave.shape[0] and wave.shape[1] > 64:
        raise UserError(f"{name}: samples of shape {list(wave.shape)}: channels come last")
    if channel is not None and not 0 <= channel < (1 if wave.ndim == 1 else wave.shape[1]):
        raise UserError(f"{name} has no channel {channel}, counted from 0")
    if wave.ndim == 2:
        wave = wave.mean(axis=1) if channel is None else wave[:, channel]
    return np.ascontiguousarray(wave, dtype=np.float32)


def damage(source: Source) -> tuple[str, ...]:
    """What is wrong with a file that can be read: that it is cut off. Empty for other sources."""
    if not isinstance(source, (str, Path)):
        return ()
    try:
        with open(source, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as m:
            check_whole(m)  # without a copy of the file
    except AudioError as error:
        return (f"{error.cause}: {error.detail}",)
    except (OSError, ValueError):
        return ()
    return ()
