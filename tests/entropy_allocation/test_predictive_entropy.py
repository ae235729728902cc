import math

import pytest
import torch

from dsasr.entropy_allocation.predictive_entropy import (
    AllocationSums,
    CtcEntropySums,
    EntropySums,
    frame_entropy,
)


def test_means_and_gap():
    sums = EntropySums()
    sums.update(torch.tensor([[1.0, 0.05], [3.0, 9.0]]), mask=torch.tensor([[1, 1], [1, 0]]).bool())
    sums.update(torch.tensor([2.0]), torch.tensor([2.5]))
    summary = sums.value()
    assert summary.count == 4
    assert summary.entropy == pytest.approx(6.05 / 4)
    assert summary.spread == pytest.approx(torch.tensor([1, 0.05, 3, 2]).std(correction=0).item())
    assert summary.confident == 0.25
    assert summary.nll == 2.5
    assert summary.gap == pytest.approx(0.5)
    assert math.isnan(EntropySums().value().entropy)
    with pytest.raises(ValueError, match="differ"):
        sums.update(torch.zeros(3), torch.zeros(2))


def test_calibrated_samples_have_no_gap():
    generator = torch.Generator().manual_seed(0)
    log_probs = (2 * torch.randn(20_000, 10, generator=generator)).log_softmax(-1)
    target = torch.multinomial(log_probs.exp(), 1, generator=generator)
    sums = EntropySums()
    sums.update(frame_entropy(log_probs), -log_probs.gather(1, target)[:, 0])
    assert abs(sums.value().gap) < 0.02


def test_frame_entropy_known():
    uniform = torch.full((1, 2, 8), -math.log(8))
    certain = torch.full((1, 2, 8), -math.inf)
    certain[..., 3] = 0
    torch.testing.assert_close(frame_entropy(uniform), torch.full((1, 2), math.log(8)))
    assert frame_entropy(certain).abs().max() == 0


def test_ctc_split():
    log_probs = torch.full((2, 3, 4), -math.log(4))
    log_probs[:, 0] = torch.tensor([0, -math.inf, -math.inf, -math.inf])  # a sure blank
    log_probs[:, 1:, 2] += 0.1
    log_probs = log_probs.log_softmax(-1)
    sums, other = CtcEntropySums(), CtcEntropySums()
    sums.update(log_probs[:1], torch.tensor([3]))
    other.update(log_probs[1:], torch.tensor([2]))
    sums.merge(other)
    value = sums.value()
    h = frame_entropy(log_probs)[0, 1].item()
    assert value.speech == pytest.approx(h)
    assert value.speech_share == pytest.approx(3 / 5)
    assert value.frames == pytest.approx(3 * h / 5)
    assert math.isnan(CtcEntropySums().value().frames)


def test_allocation():
    sums = AllocationSums()
    sums.update(torch.tensor([4.0, 6.0]), torch.tensor([1.0, 2.0]))
    sums.update(torch.tensor([99.0, 2.0]), torch.tensor([9.0, 0.0]), torch.tensor([False, True]))
    value = sums.value()
    assert (value.without_audio, value.with_audio, value.tokens) == (4, 1, 3)
    assert (value.resolved, value.share) == (3, 0.75)
    assert math.isnan(AllocationSums().value().resolved)
    with pytest.raises(ValueError, match="without audio"):
        sums.update(torch.zeros(3), torch.zeros(2))
