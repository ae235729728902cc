import math

import pytest
import torch

from dsasr.entropy_allocation import probes as p
from dsasr.utils.errors import UserError


def _generator(seed=0):
    return torch.Generator().manual_seed(seed)


def _thirds(x, label, context=None):
    n = len(label) // 3
    cut = [slice(0, n), slice(n, 2 * n), slice(2 * n, None)]
    return [p.Frames(x[c], label[c], None if context is None else context[c]) for c in cut]


def test_recovers_a_softmax_model():
    # Labels are drawn from a linear softmax: its own nll is the best there is.
    scale = torch.tensor([1, 5, 0.1, 1, 1, 1])
    x = torch.randn(9000, 6, generator=_generator()) * scale + 3
    weight = torch.randn(6, 5, generator=_generator(1)) / scale[:, None]
    log_q = ((x - 3) @ weight).log_softmax(-1)
    label = torch.multinomial(log_q.exp(), 1, generator=_generator(2))[:, 0]
    train, valid, test = _thirds(x, label)
    probe = p.fit(train, valid, 5)
    best = -log_q[6000:].gather(1, label[6000:, None]).mean().item()
    assert probe.nll(test).mean().item() == pytest.approx(best, abs=0.01)


def test_nothing_to_find_is_the_marginal():
    x = torch.randn(600, 50, generator=_generator())
    label = torch.randint(0, 3, (600,), generator=_generator(1)) ** 2
    train, valid, test = _thirds(x, label)
    probe = p.fit(train, valid, 5)
    share = (torch.bincount(train.label_N, minlength=5) + 0.5) / (len(train) + 2.5)
    marginal = -share.log()[test.label_N].mean().item()
    assert probe.nll(test).mean().item() == pytest.approx(marginal, abs=0.05)


def test_context_tables_equal_one_hots():
    context = torch.randint(0, 4, (3000, 2), generator=_generator())
    label = torch.where(context[:, 1] == 3, 0, context[:, 0])
    noise = torch.rand(3000, generator=_generator(1)) < 0.2
    label[noise] = torch.randint(0, 4, (int(noise.sum()),), generator=_generator(2))
    tables = _thirds(torch.zeros(3000, 0), label, context)
    one_hot = torch.nn.functional.one_hot(context, 4).flatten(1).float()
    dense = _thirds(one_hot, label)
    config = p.ProbeConfig(penalties=(1e-2, 1e-3, 1e-5), iterations=60)
    left = p.fit(tables[0], tables[1], 4, context_symbols=4, config=config).nll(tables[2]).mean()
    right = p.fit(dense[0], dense[1], 4, config=config).nll(dense[2]).mean()
    assert left.item() == pytest.approx(right.item(), abs=0.01)
    # Both see that the second symbol changes the label, which the first alone cannot.
    narrow = _thirds(torch.zeros(3000, 0), label, context[:, :1])
    probe = p.fit(narrow[0], narrow[1], 4, context_symbols=4, config=config)
    first = probe.nll(narrow[2]).mean()
    assert first > left + 0.1


def test_linear_maps_do_not_count():
    label = torch.randint(0, 4, (3000,), generator=_generator())
    x = torch.randn(4, 12, generator=_generator(1))[label] * 0.5
    x += torch.randn(3000, 12, generator=_generator(2))
    mixing = torch.linalg.qr(torch.randn(12, 12, generator=_generator(3))).Q
    mixing = mixing * torch.logspace(-2, 2, 12)
    nll = [p.fit(*(t := _thirds(y, label))[:2], 4).nll(t[2]).mean() for y in (x, x @ mixing + 5)]
    assert nll[0].item() == pytest.approx(nll[1].item(), abs=1e-3)
    assert nll[0] < 0.9


def test_constant_and_huge_dimensions_do_no_harm():
    label = torch.randint(0, 3, (900,), generator=_generator())
    x = torch.cat(
        [
            1e6 + 1e3 * torch.nn.functional.one_hot(label, 3),
            torch.full((900, 1), 7.7),
            torch.zeros(900, 1),
        ],
        1,
    )
    train, valid, test = _thirds(x, label)
    nll = p.fit(train, valid, 3).nll(test)
    assert torch.isfinite(nll).all() and nll.mean() < 0.01


def test_without_features_it_is_the_marginal():
    label = torch.tensor([0, 0, 1, 0] * 30)
    train, valid, test = _thirds(torch.zeros(120, 0), label)
    probe = p.fit(train, valid, 3)
    assert probe.penalty is None and probe.table_penalty is None
    share = torch.bincount(train.label_N, minlength=3) + 0.5
    expected = (share / share.sum()).log().neg()[test.label_N].double()
    torch.testing.assert_close(probe.nll(test), expected, rtol=1e-6, atol=1e-6)


def test_empty_sides_are_refused():
    frames = p.Frames(torch.zeros(4, 2), torch.zeros(4, dtype=torch.int64))
    none = p.Frames(torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64))
    with pytest.raises(ValueError, match="needs frames"):
        p.fit(frames, none, 2)
    with pytest.raises(UserError, match="fall"):
        p.ProbeConfig(penalties=(1e-3, 1e-2))


def test_useless_features_lose_to_none():
    x = torch.randn(600, 50, generator=_generator())
    label = torch.randint(0, 3, (600,), generator=_generator(1))
    probe = p.fit(*_thirds(x, label)[:2], 3)
    assert probe.penalty is None and not probe.weight_RC.any()
    seen = p.fit(*_thirds(torch.nn.functional.one_hot(label, 3).float(), label)[:2], 3)
    assert seen.penalty is not None and seen.weight_RC.any()


def test_projection_is_fixed_and_keeps_lengths():
    matrix = p.projection(4000, 256)
    assert torch.equal(matrix, p.projection(4000, 256))
    x = torch.randn(20, 4000, generator=_generator())
    ratio = (x @ matrix).norm(dim=1) / x.norm(dim=1)
    assert ratio.mean().item() == pytest.approx(1, abs=0.05)
    assert math.isclose(matrix.mean().item(), 0, abs_tol=1e-3)
