import math

import numpy as np
import pytest

from dsasr.utils import bootstrap


def _ends(numerators_N, denominators_N, level=0.95, draws=1000, seed=0):
    (ratios,) = bootstrap.resampled_ratios([numerators_N], denominators_N, draws, seed)
    return bootstrap.interval(ratios, numerators_N, denominators_N, level)


def _utterances(rng, count, mean):
    """Errors and words of utterances whose error rates differ, around ``mean``."""
    words_N = rng.poisson(9, count) + 1.0
    rates_N = rng.beta(5 * mean, 5 * (1 - mean), count)
    return rng.binomial(words_N.astype(int), rates_N).astype(float), words_N


@pytest.mark.parametrize(
    ("count", "mean", "least"), [(16, 0.1, 0.88), (48, 0.1, 0.90), (16, 0.4, 0.92)]
)
def test_the_interval_covers_with_few_utterances(count, mean, least):
    rng = np.random.default_rng(1)
    inside = plain = 0
    for seed in range(300):
        errors_N, words_N = _utterances(rng, count, mean)
        (ratios,) = bootstrap.resampled_ratios([errors_N], words_N, 400, seed)
        low, high = bootstrap.interval(ratios, errors_N, words_N, 0.95)
        inside += low <= mean <= high
        low, high = np.quantile(ratios, [0.025, 0.975])
        plain += low <= mean <= high
    assert inside / 300 >= least and inside >= plain


def test_students_quantile():
    # t of 0.975 with 9, 29 and 199 degrees of freedom.
    for count, t in ((10, 2.2622), (30, 2.0452), (200, 1.9720)):
        expected = t * math.sqrt(count / (count - 1))
        assert bootstrap._reach(count, 0.95) == pytest.approx(expected, rel=2e-4)


def test_even_utterances_have_the_normal_interval():
    rng = np.random.default_rng(0)
    x = rng.normal(1.0, 1.0, 1000)
    x = np.concatenate([x, 2 - x])  # symmetric: no bias, no skewness
    low, high = _ends(x, np.ones(2000), draws=8000)
    half = 1.96 * x.std() / math.sqrt(2000)
    assert (1 - low, high - 1) == pytest.approx((half, half), rel=0.06)


def test_skewed_utterances_have_a_longer_upper_side():
    x = np.zeros(60)
    x[:4] = 5.0
    low, high = _ends(x, np.ones(60))
    value = x.mean()
    assert low > 0 and high - value > 1.3 * (value - low)


def test_degenerate_sets():
    assert _ends(np.zeros(7), np.ones(7)) == (0.0, 0.0)
    assert _ends(np.full(7, 2.0), np.ones(7)) == (2.0, 2.0)
    assert _ends(np.array([3.0]), np.array([2.0])) == (1.5, 1.5)
    low, high = _ends(np.array([1.0, 0.0]), np.array([1.0, 0.0]))  # one without a reference
    assert math.isfinite(low) and low <= high
