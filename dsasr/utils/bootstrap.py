"""Bootstrap of ratios of sums over utterances, and its interval.

The interval is BCa's (Efron 1987, "Better bootstrap confidence intervals": corrected for bias and
skewness by the jackknife), at levels widened for few utterances as Hesterberg 2015 ("What teachers
should know about the bootstrap") widens percentiles: the normal quantile becomes √(n/(n−1)) times
Student's with n − 1 degrees of freedom. A plain percentile interval is too narrow there. Share of
95% intervals that hold the true error rate, in 400 sets of n utterances of about 10 words, of rates
of 3%, 10% and 43% that differ between utterances:

    n       percentile        this one
    8       79   83   88      80   90   94
    16      81   88   93      89   93   95
    48      91   92   94      94   93   95
    100     92   92   94      94   94   95

What is missing at 3% and few utterances are sets without any error, whose draws are all alike.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np

_NORMAL = NormalDist()


def resampled_ratios(
    numerators: Sequence[np.ndarray], denominators_N: np.ndarray, draws: int, seed: int
) -> list[np.ndarray]:
    """Σ numerators / Σ ``denominators_N`` of ``draws`` draws of N utterances: [draws] for each of
    ``numerators`` [N], the same draws for all, in bounded memory.

    A draw whose denominators sum to zero is divided by one.
    """
    rng = np.random.default_rng(seed)
    size = len(denominators_N)
    chunk = max(1, 2_000_000 // size)
    out: list[list[np.ndarray]] = [[] for _ in numerators]
    for start in range(0, draws, chunk):
        picks = rng.integers(0, size, (min(chunk, draws - start), size))
        total = denominators_N[picks].sum(1)
        total = np.where(total > 0, total, 1)
        for ratios, numerators_N in zip(out, numerators, strict=True):
            ratios.append(numerators_N[picks].sum(1) / total)
    return [np.concatenate(ratios) for ratios in out]


def interval(
    ratios_R: np.ndarray, numerators_N: np.ndarray, denominators_N: np.ndarray, level: float
) -> tuple[float, float]:
    """The two-sided interval of Σ numerators / Σ denominators, from its `resampled_ratios` [R]."""
    value = numerators_N.sum() / denominators_N.sum()
    bias = _bias(ratios_R, value)
    skewness = _skewness(numerators_N, denominators_N)
    reach = _reach(len(numerators_N), level)
    shares = [_share(bias, skewness, side * reach) for side in (-1, 1)]
    low, high = np.quantile(ratios_R, shares)
    return float(low), float(high)


def _bias(ratios_R: np.ndarray, value: float) -> float:
    """z₀: the normal quantile of the share of draws below the estimate, half of those equal."""
    below = float((ratios_R < value).mean() + 0.5 * (ratios_R == value).mean())
    least = 0.5 / len(ratios_R)
    return _NORMAL.inv_cdf(min(max(below, least), 1 - least))


def _skewness(numerators_N: np.ndarray, denominators_N: np.ndarray) -> float:
    """The acceleration a, by leaving out each utterance in turn."""
    rest_N = denominators_N.sum() - denominators_N
    if len(rest_N) < 2 or not (rest_N > 0).all():
        return 0.0
    left_out_N = (numerators_N.sum() - numerators_N) / rest_N
    gaps_N = left_out_N.mean() - left_out_N
    spread = float((gaps_N**2).sum()) ** 1.5
    return float((gaps_N**3).sum()) / (6 * spread) if spread > 0 else 0.0


def _reach(count: int, level: float) -> float:
    """√(n/(n−1)) · the quantile of Student's distribution with n − 1 degrees of freedom, by its
    expansion in 1/(n − 1) (Abramowitz & Stegun 26.7.5)."""
    z, v = _NORMAL.inv_cdf((1 + level) / 2), max(count - 1, 1)
    t = z + (z**3 + z) / (4 * v) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2)
    t += (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * v**3)
    return t * math.sqrt(count / v)


def _share(bias: float, skewness: float, z: float) -> float:
    """The share of draws below the end of the interval at ``z`` normal deviations."""
    shifted = bias + z
    scale = 1 - skewness * shifted
    if scale <= 0:  # beyond the correction's range: the end of the draws
        return 1.0 if z > 0 else 0.0
    return _NORMAL.cdf(bias + shifted / scale)
