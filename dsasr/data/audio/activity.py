"""Which frames of a recording hold sound: by energy above a tracked noise floor (**ours**).

A constant offset is removed first: it is no sound. The floor is a low quantile of the
smoothed power. A frame is active where it is `ABOVE_FLOOR` dB above the floor, within `BELOW_PEAK`
dB of the loudest frames around it, and above `QUIET`. Loud sound without a pause has no floor to be
above: what is above `LOUD` and near the loudest frames is active as well.
"""

from __future__ import annotations

import numpy as np

FRAME = 0.01  # seconds
ABOVE_FLOOR = 6.0  # dB
BELOW_PEAK = 35.0  # dB
QUIET = -65.0  # dB of full scale: what lies below is silence
LOUD, NEAR_PEAK = -40.0, 10.0  # dB
_LEAST = 1e-10  # of power: -100 dB


def frame_power(wave: np.ndarray, rate: int) -> np.ndarray:
    """Mean square of each frame of 10 ms, around the median of the half second that it is in; the
    last frame may be shorter."""
    size, span = max(int(FRAME * rate), 1), max(int(rate * 0.5), 1)
    power = []
    for start in range(0, len(wave), span - span % size or size):
        part = np.asarray(wave[start : start + (span - span % size or size)], np.float64)
        part = part - np.median(part)  # the mean would move with a click
        whole = len(part) // size * size
        power.append(np.square(part[:whole]).reshape(-1, size).mean(axis=1))
        if whole < len(part):
            power.append(np.array([np.square(part[whole:]).mean()]))
    return np.concatenate(power) if power else np.zeros(0)


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
    active = active_frames(decibels(frame_power(wave, rate)))
    where = np.flatnonzero(active)
    if not len(where):
        return 0.0, 0.0, 0.0
    pause = int(np.diff(where).max(initial=1)) - 1
    return float(where[0] * FRAME), float((where[-1] + 1) * FRAME), pause * FRAME
