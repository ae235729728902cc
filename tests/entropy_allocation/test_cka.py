import math

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
    total = {name: sum(r.sums[name] for r in ranks) for name in ranks[0].sums}

    def all_reduce(tensor):
        [name] = [k for k, v in ranks[2].sums.items() if v is tensor]
        tensor.copy_(total[name])

    assert ranks[2].frames == 0 and math.isnan(ranks[2].value())
    ranks[2].reduce(all_reduce)
    assert ranks[2].frames == 1003
    assert ranks[2].value() == pytest.approx(cka(x, y), abs=1e-9)
    unbiased = ranks[2].value(unbiased=True)
    assert unbiased == pytest.approx(cka(x, y, unbiased=True), abs=1e-9)


def test_a_large_mean_costs_little():
    x, y = _normal(400, 8), _normal(400, 8, seed=1)
    y = x + 0.3 * y
    assert cka(x + 1000, y - 1000) == pytest.approx(cka(x, y), abs=1e-6)


def test_degenerate_sides_have_no_value():
    x = _normal(10, 4)
    assert math.isnan(cka(x, torch.full((10, 4), 0.1)))
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
