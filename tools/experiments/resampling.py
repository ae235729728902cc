"""Intervals and paired tests over seeds and clips, for tools/experiments/summary.py.

A result is a `Ratio`: Σ over / Σ under of its clips, averaged over seeds. Two things are random,
the seed and the clips, and crossed: all seeds are tested on the same clips. So a draw is the sum of
two parts (**ours**; Monte Carlo of a fiducial sum, as in Behrens and Fisher's problem):

    draw = mean over seeds of the ratio of resampled clips + t · s / √S

with the clips drawn with replacement (Bisani & Ney 2004), the same for all seeds and both systems
of a pair, s the standard deviation over the S seeds (of a pair: of their differences) and t from
Student's distribution with S − 1 degrees of freedom. A bootstrap over three seeds would be too
narrow: it has a third less variance, and normal tails. Both parts contain the noise of a seed on a
clip, so that intervals are, if anything, too wide. One seed has no second part: its interval does
not cover other seeds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

DRAWS = 4000
LEVEL = 0.95
Ratio = tuple[np.ndarray, np.ndarray]  # over, under: a row per seed, a column per clip


def by_seed(ratio: Ratio) -> np.ndarray:
    """Σ over / Σ under of each seed; NaN where Σ under is 0."""
    over, under = (side.sum(1) for side in ratio)
    return np.divide(over, under, out=np.full(len(over), math.nan), where=under > 0)


def value(ratio: Ratio) -> float:
    """The mean over seeds."""
    return float(by_seed(ratio).mean())


def _clips(ratio: Ratio, rng: np.random.Generator) -> np.ndarray:
    """The mean over seeds in `DRAWS` draws of the clips; the same generator, the same picks."""
    over, under = ratio
    clips = over.shape[1]
    weights = rng.multinomial(clips, np.full(clips, 1 / clips), DRAWS).T.astype(float)
    return ((over @ weights) / np.maximum(under @ weights, 1e-9)).mean(0)


def _seeds(values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The deviation of other seeds from the mean of ``values``; unknown, and so 0, with one."""
    count = len(values)
    if count < 2:
        return np.zeros(DRAWS)
    return rng.standard_t(count - 1, DRAWS) * values.std(ddof=1) / math.sqrt(count)


def _ends(draws: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def interval(ratio: Ratio, highest: float = math.inf) -> tuple[float, float]:
    """The 95% interval of `value`, within [0, ``highest``]."""
    rng = np.random.default_rng(0)
    low, high = _ends(_clips(ratio, rng) + _seeds(by_seed(ratio), rng))
    return max(0.0, low), min(highest, high)


def paired(a: Ratio, b: Ratio) -> tuple[float, float, float, float]:
    """(difference b − a, low, high, two-sided p); both sides have the same seeds by row and the
    same clips by column. Raises ValueError for other shapes."""
    if a[0].shape != b[0].shape:
        raise ValueError(f"{a[0].shape} and {b[0].shape} seeds and clips are no pairs")
    clips = _clips(b, np.random.default_rng(0)) - _clips(a, np.random.default_rng(0))
    gaps = by_seed(b) - by_seed(a)
    draws = clips + _seeds(gaps, np.random.default_rng(1))
    low, high = _ends(draws)
    tail = min((draws <= 0).sum(), (draws >= 0).sum())
    return float(gaps.mean()), low, high, min(1.0, 2 * (int(tail) + 1) / (DRAWS + 1))


# -- seeds alone -------------------------------------------------------------------------------


def _student(degrees: int) -> tuple[np.ndarray, np.ndarray]:
    """|t| and P(|T| ≤ |t|) of Student's distribution: with t = √ν tan θ its density is that of
    cosᵛ⁻¹ θ, which is finite."""
    angles = np.linspace(0, math.pi / 2, 200_001)
    density = np.cos(angles) ** (degrees - 1)
    below = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return math.sqrt(degrees) * np.tan(angles), below / below[-1]


def over_seeds(values: Sequence[float]) -> tuple[float, float, float]:
    """(mean, half its 95% interval, two-sided p of a mean of zero) by Student's t: of a figure that
    has no clips, or of its paired differences. With one value the last two are NaN."""
    array = np.asarray(values, float)
    mean, count = float(array.mean()), len(array)
    if count < 2:
        return mean, math.nan, math.nan
    t, below = _student(count - 1)
    error = float(array.std(ddof=1)) / math.sqrt(count)
    half = float(np.interp(LEVEL, below, t)) * error
    if not error:
        return mean, half, 1.0 if not mean else 0.0
    return mean, half, float(1 - np.interp(abs(mean) / error, t, below))
