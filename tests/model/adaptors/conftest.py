"""What every adaptor of `dsasr.model.adaptors.protocol` must do, whatever its kind."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from dsasr.model.adaptors.protocol import Adaptor, AdaptorConfig, build_adaptor

LENGTHS = (13, 1, 8, 30, 7)


def make(width: int = 5, out_width: int = 6, scale: float = 1.0, **settings) -> Adaptor:
    torch.manual_seed(0)
    return build_adaptor(AdaptorConfig(**settings), width, out_width, scale)


def _rows(adaptor: Adaptor, width: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(n, width, generator=generator, dtype=torch.float64) for n in LENGTHS]


def _gradients(adaptor: Adaptor, loss: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, list(adaptor.parameters())))


def check_batch(adaptor: Adaptor, width: int = 5) -> None:
    """An utterance alone, and among others with rubbish in the padding: the same embeddings, in
    every form that can be asked for, and the same gradients."""
    adaptor = adaptor.double()
    rows, lengths_B = _rows(adaptor, width), torch.tensor(LENGTHS)
    batch = pad_sequence(rows, True, padding_value=7.0)
    batch[1, 3:] = torch.nan  # what lies in the padding is not read
    counts = adaptor.output_lengths(lengths_B)
    padded, out_lengths = adaptor(batch, lengths_B)
    packed, _ = adaptor(batch, lengths_B, packed=True)
    assert torch.equal(out_lengths, counts) and padded.shape[1] == int(counts.max())
    assert packed.shape == (int(counts.sum()), padded.shape[2])
    out, index = torch.zeros(2 * len(packed), padded.shape[2]), torch.arange(len(packed)) * 2 + 1
    written, _ = adaptor(batch, lengths_B, out_LD=out, index_N=index)
    assert written.data_ptr() == out.data_ptr() and not written[::2].any()
    torch.testing.assert_close(written[1::2], packed.float())
    weight = torch.randn(packed.shape[1], generator=torch.Generator().manual_seed(2)).double()
    together = _gradients(adaptor, (packed @ weight).square().sum())
    alone, start = [torch.zeros_like(p) for p in adaptor.parameters()], 0
    for i, row in enumerate(rows):
        embeds, length = adaptor(row[None], lengths_B[i : i + 1])
        assert embeds.shape[1] == int(length) == int(counts[i])
        torch.testing.assert_close(padded[i, : int(length)], embeds[0], atol=1e-12, rtol=1e-10)
        assert not padded[i, int(length) :].any()
        torch.testing.assert_close(packed[start : start + int(length)], embeds[0])
        start += int(length)
        parts = _gradients(adaptor, (embeds @ weight).square().sum())
        alone = [a + b for a, b in zip(alone, parts, strict=True)]
    for (name, _), a, b in zip(adaptor.named_parameters(), together, alone, strict=True):
        assert a.any(), f"{name} has no gradient"
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-8, msg=name)


def check_input_gradient(adaptor: Adaptor, width: int = 5) -> None:
    """No gradient reaches the padding, and every valid frame gets one."""
    adaptor = adaptor.double()
    batch = pad_sequence(_rows(adaptor, width), True).requires_grad_()
    adaptor(batch, torch.tensor(LENGTHS), packed=True)[0].square().sum().backward()
    for row, length in enumerate(LENGTHS):
        assert batch.grad[row, :length].abs().sum(1).all()
        assert not batch.grad[row, length:].any()


def check_scale(scale: float = 0.03, **settings) -> None:
    adaptor = make(96, 256, scale, **settings)
    frames = nn.functional.layer_norm(torch.randn(8, 80, 96), (96,))
    embeds, _ = adaptor(frames, torch.full((8,), 80), packed=True)
    assert float(embeds.detach().square().mean().sqrt()) == pytest.approx(scale, rel=0.1)


def check_waits_for_nothing(adaptor: Adaptor, width: int = 5) -> None:
    """With lengths on the CPU: device "meta" has no values that a host could ask for."""
    adaptor = adaptor.to("meta")
    lengths_B = torch.tensor(LENGTHS)
    count = int(adaptor.output_lengths(lengths_B).sum())
    frames = torch.empty(len(LENGTHS), max(LENGTHS), width, device="meta")
    out = torch.empty(count + 3, 6, device="meta")
    index = torch.empty(count, dtype=torch.int64, device="meta")
    embeds, lengths = adaptor(frames, lengths_B, out_LD=out, index_N=index)
    assert embeds is out and lengths.device.type == "cpu"
    embeds.sum().backward()


def check_dtype(adaptor: Adaptor, width: int = 5) -> None:
    adaptor = adaptor.to(torch.bfloat16)
    frames = torch.randn(2, 9, width)
    embeds, _ = adaptor(frames, torch.tensor([9, 4]), packed=True)
    assert embeds.dtype is torch.bfloat16 and embeds.isfinite().all()


@pytest.fixture
def new():
    """``new(width, out_width, scale, **settings)``: an adaptor."""
    return make


@pytest.fixture
def protocol():
    """``protocol(**settings)``: all checks on adaptors of these settings."""

    def check(**settings) -> None:
        check_batch(make(**settings))
        check_input_gradient(make(**settings))
        check_waits_for_nothing(make(**settings))
        check_dtype(make(**settings))
        check_scale(**{k: v for k, v in settings.items() if k != "hidden"})

    return check
