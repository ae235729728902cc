"""Which frames of a recording hold sound: by energy above a tracked noise floor (**ours**).

Offset and hum are taken off first. The floor is a low quantile of the smoothed power. A frame is
active where it is `ABOVE_FLOOR` dB above the floor, within `BELOW_PEAK` dB of the loudest frames
around it, and above `QUIET`. Loud sound without a pause has no floor to be above: what is above
`LOUD` and near the loudest frames is active as well.
"""

from __future__ import annotations

import numpy as np

FRAME = 0.01  # seconds
AVERAGE = 0.006  # seconds of the moving average that is taken off
ABOVE_FLOOR = 6.0  # dB
BELOW_PEAK = 35.0  # dB
QUIET = -65.0  # dB of full scale: what lies below is silence
LOUD, NEAR_PEAK = -40.0, 10.0  # dB
_LEAST = 1e-10  # of power: -100 dB


def frame_power(wave: np.ndarray, rate: int) -> np.ndarray:
    """Mean square of each frame of 10 ms, without what is below speech; the last frame may be
    shorter.

    A moving average of 6 ms is taken off: an offset is gone, a mains hum 17 dB lower.
    """
    size = max(int(FRAME * rate), 1)
    wave = _high_passed(np.asarray(wave, np.float64), rate)
    whole = len(wave) // size * size
    power = np.square(wave[:whole]).reshape(-1, size).mean(axis=1)
    if whole < len(wave):
        power = np.append(power, np.square(wave[whole:]).mean())
    return power


def _high_passed(wave: np.ndarray, rate: int) -> np.ndarray:
    half = max(int(AVERAGE * rate / 2), 1)
    if not len(wave):
        return wave
    sums = np.cumsum(np.pad(wave, (half + 1, half), mode="edge"))
    return wave - (sums[2 * half + 1 :] - sums[: -2 * half - 1]) / (2 * half + 1)


def decibels(power: np.ndarray) -> np.ndarray:
    return 10 * np.log10(np.maximum(power, _LEAST))


def active_frames(power_db: np.ndarray, floor_db: float | None = None) -> np.ndarray:
    """Whether each frame is active; ``floor_db``: a floor known from before, which counts as well
    (speech without a pause has no floor of its own)."""
    if not len(power_db):
        return np.zeros(0, bool)
    floor = noise_floor(power_db)
    if floor_db is not None:
        floor = min(floor, floor_db)
    peak = float(np.quantile(power_db, 0.95))
    above = min(floor + ABOVE_FLOOR, max(peak - NEAR_PEAK, LOUD))
    threshold = max(above, peak - BELOW_PEAK, QUIET)
    return power_db > threshold


def noise_floor(power_db: np.ndarray) -> float:
    """The 5% quantile of the power smoothed over 50 ms, in dB."""
    smooth = np.convolve(power_db, np.ones(5) / 5, mode="valid") if len(power_db) > 5 else power_db
    return float(np.quantile(smooth, 0.05))


def runs(mask: np.ndarray) -> list[tuple[int, int]]:
    """The runs of True in ``mask``, as (start, end) with the end exclusive."""
    edges = np.flatnonzero(np.diff(np.concatenate(([0], mask.astype(np.int8), [0]))))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


def spoken_part(wave: np.ndarray, rate: int) -> tuple[float, float, float]:
    """(start, end) in seconds of what is active in ``wave``, and the longest pause between.

    (0, 0, 0) where nothing is.
    """
    return spoken_frames(frame_power(wave, rate))


def spoken_frames(power: np.ndarray) -> tuple[float, float, float]:
    """`spoken_part` of audio of which the frames' power is known (`frame_power`)."""
    where = np.flatnonzero(active_frames(decibels(power)))
    if not len(where):
        return 0.0, 0.0, 0.0
    pause = int(np.diff(where).max(initial=1)) - 1
    return float(where[0] * FRAME), float((where[-1] + 1) * FRAME), pause * FRAME
