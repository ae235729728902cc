"""Predictive entropy of the CTC head and of the LLM, with and without the audio.

Per frame (CTC) or token (LLM), with the model's distribution q over V outcomes:

    entropy = −Σ_v q(v) ln q(v)         nll = −ln q(target)         (nats)

A model that is calibrated has equal means of both. `dsasr.kernels` computes both without a [N, V]
matrix. PAI and CSAI (`pai_csai`) are per frame, H₀ and H₁ (`LlmAllocation`) per token.
Frames are not independent, so PAI and CSAI are shown beside H₀ − H₁ and never multiplied into nats
per token.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from dsasr.data.batch import Batch
from dsasr.entropy_allocation.accumulators import Sums
from dsasr.entropy_allocation.allocation_row import CtcEntropy, LlmAllocation


def frame_entropy(log_probs_BSP: Tensor) -> Tensor:
    """Entropy [B, S] in nats of normalized log-probabilities; −inf entries add 0."""
    return torch.special.entr(log_probs_BSP.float().exp()).sum(-1)


class CtcEntropySums(Sums):
    """Streaming `CtcEntropy`.

    Blank frames are nearly certain, so that the mean of all frames hides what the head does on
    speech; the split is **ours**.
    """

    def __init__(self) -> None:
        super().__init__({name: () for name in ("n", "entropy", "n_speech", "speech")})

    @torch.no_grad()
    def update(self, log_probs_BSP: Tensor, lengths_B: Tensor, blank: int = 0) -> None:
        """Add a padded batch of CTC log-posteriors, on the CPU."""
        frames_S = torch.arange(log_probs_BSP.shape[1], device=log_probs_BSP.device)
        valid_BS = frames_S[None, :] < lengths_B.to(log_probs_BSP.device)[:, None]
        entropy_BS = frame_entropy(log_probs_BSP)
        speech_BS = valid_BS & (log_probs_BSP.argmax(-1) != blank)
        for count, total, mask in (
            ("n", "entropy", valid_BS),
            ("n_speech", "speech", speech_BS),
        ):
            self.sums[count] += mask.sum()
            self.sums[total] += entropy_BS[mask].to(torch.float64).sum()

    def value(self) -> CtcEntropy:
        n, total, n_speech, speech = (float(value) for value in self.sums.values())
        return CtcEntropy(
            entropy=total / n if n else math.nan,
            speech_entropy=speech / n_speech if n_speech else math.nan,
            speech_share=n_speech / n if n else math.nan,
        )


def llm_sums(model, batch: Batch) -> dict[str, tuple[Tensor, Tensor]]:
    """(sum, count) over the batch's tokens of each mean of `LlmAllocation`.

    ``model`` is a speech LLM; without audio the same, trained language model reads the prompt and
    the transcript alone.
    """
    with_audio, without_audio = model(batch).sums, model(batch, audio=False).sums
    return {
        "nll_with_audio": with_audio["nll"],
        "nll_without_audio": without_audio["nll"],
        "entropy_with_audio": with_audio["entropy"],
        "entropy_without_audio": without_audio["entropy"],
    }


def llm_allocation(
    sums: Mapping[str, tuple[Tensor | float, Tensor | float]],
) -> LlmAllocation:
    """The means of the added-up (sum, count) of `llm_sums`."""
    names = ("nll_with_audio", "nll_without_audio", "entropy_with_audio", "entropy_without_audio")
    pairs = {name: tuple(map(float, sums[name])) for name in names}
    means = {name: total / count if count else math.nan for name, (total, count) in pairs.items()}
    return LlmAllocation(**means, tokens=int(sums["nll_with_audio"][1]))
