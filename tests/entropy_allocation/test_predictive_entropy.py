import math
from types import SimpleNamespace

import pytest
import torch

from dsasr.entropy_allocation.predictive_entropy import (
    CtcEntropySums,
    frame_entropy,
    llm_allocation,
    llm_sums,
)


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
    sums = CtcEntropySums()
    sums.update(log_probs[:1], torch.tensor([3]))
    sums.update(log_probs[1:], torch.tensor([2]))
    value = sums.value()
    h = frame_entropy(log_probs)[0, 1].item()
    assert value.speech_entropy == pytest.approx(h)
    assert value.speech_share == pytest.approx(3 / 5)
    assert value.entropy == pytest.approx(3 * h / 5)
    assert math.isnan(CtcEntropySums().value().entropy)


def test_llm_allocation():
    def model(batch, audio=True):
        nll, entropy = (3.0, 6.0) if audio else (12.0, 9.0)
        count = torch.tensor(3.0)
        sums = {"nll": (torch.tensor(nll), count), "entropy": (torch.tensor(entropy), count)}
        return SimpleNamespace(sums=sums)

    llm = llm_allocation(llm_sums(model, None))
    assert (llm.nll_without_audio, llm.nll_with_audio, llm.tokens) == (4, 1, 3)
    assert (llm.entropy_without_audio, llm.entropy_with_audio) == (3, 2)
    assert (llm.resolved, llm.share, llm.gap) == (3, 0.75, -1)
    none = dict.fromkeys(llm_sums(model, None), (0.0, 0.0))
    assert math.isnan(llm_allocation(none).resolved)
