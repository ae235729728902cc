"""The convolutional adaptor against its formula, worked out frame by frame."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dsasr.model.adaptors.conv import kernel, strides
from dsasr.model.adaptors.protocol import AdaptorConfig
from dsasr.utils.errors import UserError


def plain(adaptor, frames_SE: torch.Tensor) -> torch.Tensor:
    """One utterance: each output frame's products, one by one."""
    x = frames_SE
    for weight, bias, stride in adaptor._convolutions():
        reach, outputs = stride - 1, []
        for center in range(0, len(x), stride):
            total = bias.clone()
            for tap in range(2 * stride - 1):
                place = center - reach + tap
                if 0 <= place < len(x):
                    total = total + weight[:, :, tap] @ x[place]
            outputs.append(F.gelu(total))
        x = torch.stack(outputs)
    return x @ adaptor.weight.T + adaptor.bias


def test_two_convolutions_share_a_stride_that_has_two_factors():
    assert [strides(n) for n in (1, 2, 3, 4, 5, 6, 8, 12, 16)] == [
        (1,), (2,), (3,), (2, 2), (5,), (2, 3), (2, 4), (3, 4), (4, 4),
    ]  # fmt: skip
    assert [kernel(n) for n in (1, 2, 3, 4)] == [1, 3, 5, 7]


@pytest.mark.parametrize("stack", [1, 3, 4, 6])
@pytest.mark.parametrize("length", [1, 4, 13])
def test_it_is_the_formula(new, stack, length):
    adaptor = new(kind="conv", stack=stack, hidden=7).double()
    with torch.no_grad():
        for bias in (adaptor.bias1, adaptor.bias2, adaptor.bias):
            if bias is not None:
                bias.normal_()
    frames = torch.randn(length, 5, dtype=torch.float64)
    embeds, lengths = adaptor(frames[None], torch.tensor([length]), packed=True)
    assert lengths.tolist() == [-(-length // stack)] == [len(embeds)]
    torch.testing.assert_close(embeds, plain(adaptor, frames))


def test_a_known_answer(new):
    """Ones everywhere: each number counts the frames that it was made of."""
    adaptor = new(1, 1, kind="conv", stack=4, hidden=1, activation="relu").double()
    for parameter in adaptor.parameters():
        torch.nn.init.ones_(parameter)
    for bias in (adaptor.bias1, adaptor.bias2, adaptor.bias):
        torch.nn.init.zeros_(bias)
    # First convolution, of 3 frames each: 2 3 3 3 2. Second: 2 + 3, 3 + 3 + 3, 3 + 2.
    embeds, _ = adaptor(torch.ones(1, 10, 1, dtype=torch.float64), torch.tensor([9]))
    assert embeds.flatten().tolist() == [5, 9, 5]


def test_a_token_sees_nothing_after_its_frames(new):
    adaptor = new(kind="conv", stack=6).double()
    frames = torch.randn(1, 24, 5, dtype=torch.float64, requires_grad=True)
    embeds, _ = adaptor(frames, torch.tensor([24]), packed=True)
    for token in range(4):
        (gradient,) = torch.autograd.grad(embeds[token].sum(), frames, retain_graph=True)
        seen = gradient[0].abs().sum(1).nonzero().flatten()
        assert int(seen.max()) == 6 * (token + 1) - 1


@pytest.mark.parametrize("stack", [1, 3, 4, 8])
def test_the_protocol(protocol, stack):
    protocol(kind="conv", stack=stack, hidden=9)


@pytest.mark.parametrize("activation", ["silu", "relu"])
def test_the_protocol_with_other_activations(protocol, activation):
    protocol(kind="conv", activation=activation, hidden=60)


def test_weights_follow_the_generator(new):
    adaptor = new(kind="conv")
    assert adaptor.weight1.shape == (6, 5, 3) and adaptor.weight2.shape == (6, 6, 3)
    adaptor.reset_parameters(torch.Generator().manual_seed(3))
    first = [p.detach().clone() for p in adaptor.parameters()]
    adaptor.reset_parameters(torch.Generator().manual_seed(3))
    assert all(torch.equal(a, b) for a, b in zip(first, adaptor.parameters(), strict=True))
    adaptor.reset_parameters(torch.Generator().manual_seed(4))
    assert not torch.equal(first[0], adaptor.weight1)


@pytest.mark.parametrize(
    "settings", [{"layers": 3}, {"heads": 2}, {"queries": 2}, {"temperature": 0.5}]
)
def test_settings_of_other_kinds_are_refused(settings):
    with pytest.raises(UserError, match=f"{next(iter(settings))} has no effect"):
        AdaptorConfig(kind="conv", **settings)
