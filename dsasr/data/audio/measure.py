"""What a recording sounds like in figures: level, clipping, an estimate of its noise."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from dsasr.data.audio.resampling import RATE

FRAME_SECONDS = 0.02
FLOOR = 1e-10  # mean square of what counts as digital silence: -100 dB
FULL_SCALE = 0.985  # a sample above it, 0.13 dB below full scale, counts as clipped
QUIET, LOUD = 10, 95  # percentiles of the frames' powers
CLIPPED = 1e-4  # share of clipped samples above which a recording sounds clipped (**ours**)


@dataclass(frozen=True)
class AudioMeasures:
    """Of one recording. ``level``: root mean square in dB of full scale; ``clipped``: share of its
    samples at full scale; ``snr``: estimate of the signal-to-noise ratio in dB."""

    level: float
    clipped: float
    snr: float


def measure_audio(wave: Tensor, rate: int = RATE) -> AudioMeasures:
    """The measures of ``wave`` float32 [n] in [-1, 1]; n above 0.

    The ratio is that of the `LOUD` to the `QUIET` percentile of the power of frames of 20 ms
    (**ours**, in the way of NIST's stnr: the quietest frames are taken for noise, so that speech
    without a pause measures low, and audio that was gated or padded with zeros measures high).
    """
    samples = wave.numpy().astype(np.float64)
    square = np.square(samples)
    size = max(1, min(len(samples), round(FRAME_SECONDS * rate)))
    powers = square[: len(square) // size * size].reshape(-1, size).mean(axis=1)
    quiet, loud = np.percentile(np.maximum(powers, FLOOR), (QUIET, LOUD))
    return AudioMeasures(
        level=_decibels(max(float(square.mean()), FLOOR)),
        clipped=float((np.abs(samples) >= FULL_SCALE).mean()),
        snr=_decibels(float(loud / quiet)),
    )


def _decibels(power: float) -> float:
    return 10 * float(np.log10(power))
