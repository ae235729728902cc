import math
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsasr.entropy_allocation.cka import CkaSums, LayerCka, cka


def _normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def _gram_cka(x, y):
    """The definition over N×N Gram matrices."""
    n = len(x)
    h = torch.eye(n, dtype=torch.float64) - 1 / n
    k, v = h @ x @ x.T @ h, h @ y @ y.T @ h
    return float((k * v).sum() / (k.norm() * v.norm()))


def _song_cka(x, y):
    """Song et al.'s unbiased HSIC over N×N Gram matrices."""

    def hsic(k, v):
        n = len(k)
        k, v = k - k.diag().diag(), v - v.diag().diag()
        return (
            (k @ v).trace() + k.sum() * v.sum() / ((n - 1) * (n - 2)) - 2 * (k @ v).sum() / (n - 2)
        )

    k, v = x @ x.T, y @ y.T
    return float(hsic(k, v) / (hsic(k, k) * hsic(v, v)).sqrt())


@settings(max_examples=30, deadline=None)
@given(n=st.integers(5, 40), d=st.integers(1, 9), d_y=st.integers(1, 9), seed=st.integers(0, 10**6))
def test_equals_the_definitions(n, d, d_y, seed):
    x = _normal(n, d, seed=seed) + 3
    y = torch.tanh(x[:, :1]) + 0.5 * _normal(n, d_y, seed=seed + 1)
    assert cka(x, y) == pytest.approx(_gram_cka(x, y), abs=1e-9)
    assert cka(x, y, unbiased=True) == pytest.approx(_song_cka(x, y), abs=1e-7)
    assert cka(x, y) == pytest.approx(cka(y, x), abs=1e-12)


def test_rotation_and_scaling_do_not_count():
    x = _normal(500, 32) * torch.linspace(0.1, 3, 32, dtype=torch.float64) + 2
    rotation = torch.linalg.qr(_normal(32, 32, seed=1)).Q
    assert cka(x, 7.5 * x @ rotation - 4) == pytest.approx(1, abs=1e-12)
    assert cka(x, x @ rotation, unbiased=True) == pytest.approx(1, abs=1e-10)
    assert cka(x, x @ _normal(32, 32, seed=2)) < 0.99


def test_independent_sides():
    x, y = _normal(300, 200), _normal(300, 200, seed=1)
    assert cka(x, y) > 0.3  # the bias that the other estimate removes
    assert abs(cka(x, y, unbiased=True)) < 0.02


def test_batches_and_ranks_add_up():
    x, y = _normal(1003, 16, dtype=torch.float32), _normal(1003, 16, seed=1, dtype=torch.float32)
    y += x
    ranks = [CkaSums(16) for _ in range(3)]  # the last has no frames
    for start in range(0, 1003, 97):
        ranks[(start // 97) % 2].update(x[start : start + 97], y[start : start + 97])
    assert ranks[2].frames == 0 and math.isnan(ranks[2].value())
    _reduce(ranks)
    assert ranks[2].frames == 1003
    assert ranks[2].value() == pytest.approx(cka(x, y), abs=1e-9)
    unbiased = ranks[2].value(unbiased=True)
    assert unbiased == pytest.approx(cka(x, y, unbiased=True), abs=1e-9)


@pytest.mark.parametrize("mean", [1e3, 1e5, 1e6])
@pytest.mark.parametrize("unbiased", [False, True])
def test_a_large_mean_costs_little(mean, unbiased):
    x, noise = _normal(400, 8), _normal(400, 8, seed=1)
    x32, y32 = (x + mean).float(), (x + 0.9 * noise - mean).float()
    # The definition on the same float32 frames, centered in float64.
    x64, y64 = (z.double() - z.double().mean(0) for z in (x32, y32))
    expected = (_song_cka if unbiased else _gram_cka)(x64, y64)
    assert 0.1 < expected < 0.9
    assert cka(x32, y32, unbiased=unbiased) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("unbiased", [False, True])
def test_ranks_with_other_means_add_up(unbiased):
    # The frames of each rank lie around another mean, far from 0, as those of other speakers do.
    x = _normal(90, 5) + 1e4
    x[30:60] += _normal(1, 5, seed=2)
    x[60:] -= 3
    y = (x - 1e4) @ _normal(5, 4, seed=3) + _normal(90, 4, seed=4) - 2e4
    ranks = [CkaSums(5, 4) for _ in range(4)]  # the last has no frames
    for rank, rows, other in zip(ranks, x.split(30), y.split(30), strict=False):
        rank.update(rows[:7], other[:7])
        rank.update(rows[7:], other[7:])
    _reduce(ranks)
    expected = cka(x, y, unbiased=unbiased)
    for rank in ranks:
        assert rank.frames == 90
        assert rank.value(unbiased=unbiased) == pytest.approx(expected, rel=1e-9)


def _reduce(ranks):
    """`CkaSums.reduce` on all ranks, one thread each: an all-reduce waits for all of them."""
    barrier, shares = threading.Barrier(len(ranks)), [None] * len(ranks)

    def run(number):
        def all_reduce(tensor):
            shares[number] = tensor.clone()
            barrier.wait()
            total = sum(shares)
            barrier.wait()
            tensor.copy_(total)

        ranks[number].reduce(all_reduce)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(ranks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_degenerate_sides_have_no_value():
    x = _normal(10, 4)
    for unbiased in (False, True):
        assert math.isnan(cka(x, torch.full((10, 4), 0.1), unbiased=unbiased))
        assert math.isnan(cka(x, torch.full((10, 4), 1e-3).double() * 7, unbiased=unbiased))
    assert math.isnan(cka(x[:1], x[:1]))
    assert math.isnan(cka(x[:3], x[:3], unbiased=True))
    assert math.isnan(cka(x, x * math.nan))


def test_shapes_are_checked():
    sums = CkaSums(4, 5)
    with pytest.raises(ValueError, match=r"\[N, 4\] and \[N, 5\]"):
        sums.update(torch.zeros(3, 4), torch.zeros(2, 5))


def test_layers():
    x, y = _normal(50, 4), _normal(50, 6)
    layers = LayerCka([4, 6])
    layers.update([x[:20], y[:20]], [x[:20] * 2, y[:20].flip(0)])
    layers.update([x[20:], y[20:]], [x[20:] * 2, y[20:].flip(0)])
    assert layers.values()[0] == pytest.approx(1)
    assert layers.values()[1] < 0.9
    layers.reduce(lambda tensor: tensor.mul_(2))  # another rank with the same sums
    assert layers.layers[0].frames == 100
    with pytest.raises(ValueError):
        layers.update([x], [x])
