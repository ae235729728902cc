"""Predictive entropy of the LLM and of the CTC head, and what the audio resolves of a transcript.

Per token (LLM) or frame (CTC), with the model's distribution q over V outcomes:

    entropy = −Σ_v q(v) ln q(v)         nll = −ln q(target)         (nats)

A model that is calibrated has equal means of both; ``gap`` = nll − entropy > 0 is overconfidence
(definition of the gap: ours). `dsasr.kernels` computes both without a [N, V] matrix.

Allocation (ours): H₀ is the mean nll per transcript token of the LLM without audio, H₁ that of the
full model on the same tokens; the audio resolves H₀ − H₁. PAI and CSAI (`accessible`) are per frame
and say what the encoder's output makes available of it. Frames are not independent, so they are
shown beside the allocation and never multiplied into nats per token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dsasr.entropy_allocation.accumulators import Sums


@dataclass(frozen=True)
class EntropySummary:
    """Means in nats over ``count`` tokens or frames; ``nll`` and ``gap`` are NaN if none was given.

    ``spread`` is the standard deviation of the entropy, ``confident`` the share of outcomes with an
    entropy below 0.1 nats.
    """

    entropy: float
    spread: float
    confident: float
    nll: float
    gap: float
    count: int


class EntropySums(Sums):
    """Streaming means of predictive entropy, with the nll beside it where a target exists."""

    CONFIDENT = 0.1

    def __init__(self, *, device: torch.device | str = "cpu") -> None:
        names = ("n", "entropy", "square", "confident", "n_nll", "nll", "nll_entropy")
        super().__init__({name: () for name in names}, device)

    @torch.no_grad()
    def update(
        self, entropy: Tensor, nll: Tensor | None = None, mask: Tensor | None = None
    ) -> None:
        """Add entropies (and nlls) of any one shape; ``mask`` (bool, same shape) keeps the True."""
        keep = slice(None) if mask is None else mask.reshape(-1)
        sums = self.sums
        values = entropy.detach().reshape(-1)[keep].to(sums["n"].device, torch.float64)
        sums["n"] += len(values)
        sums["entropy"] += values.sum()
        sums["square"] += values.square().sum()
        sums["confident"] += (values < self.CONFIDENT).sum()
        if nll is not None:
            if nll.shape != entropy.shape:
                raise ValueError(f"nll {list(nll.shape)} and entropy {list(entropy.shape)} differ")
            sums["n_nll"] += len(values)
            sums["nll"] += nll.detach().reshape(-1)[keep].to(values).sum()
            sums["nll_entropy"] += values.sum()

    def value(self) -> EntropySummary:
        s = {name: float(value) for name, value in self.sums.items()}
        if not s["n"]:
            return EntropySummary(math.nan, math.nan, math.nan, math.nan, math.nan, 0)
        mean = s["entropy"] / s["n"]
        variance = s["square"] / s["n"] - mean**2
        nll = s["nll"] / s["n_nll"] if s["n_nll"] else math.nan
        gap = (s["nll"] - s["nll_entropy"]) / s["n_nll"] if s["n_nll"] else math.nan
        spread = math.sqrt(max(variance, 0.0)) if math.isfinite(variance) else math.nan
        return EntropySummary(mean, spread, s["confident"] / s["n"], nll, gap, int(s["n"]))


def frame_entropy(log_probs_BSP: Tensor) -> Tensor:
    """Entropy [B, S] in nats of normalized log-probabilities; −inf entries add 0."""
    return torch.special.entr(log_probs_BSP.float().exp()).sum(-1)


@dataclass(frozen=True)
class CtcEntropy:
    """Mean entropy in nats per frame: of all frames, and of those whose best symbol is no blank.

    ``speech`` (the latter) is NaN without such frames; ``speech_share`` is their share.
    """

    frames: float
    speech: float
    speech_share: float


class CtcEntropySums(Sums):
    """Streaming `CtcEntropy`. Blank frames are nearly certain, so the split keeps them from hiding
    what the head does on speech (the split is ours)."""

    def __init__(self, *, device: torch.device | str = "cpu") -> None:
        super().__init__({name: () for name in ("n", "entropy", "n_speech", "speech")}, device)

    @torch.no_grad()
    def update(self, log_probs_BSP: Tensor, lengths_B: Tensor, blank: int = 0) -> None:
        """Add a padded batch of CTC log-posteriors."""
        places_S = torch.arange(log_probs_BSP.shape[1], device=log_probs_BSP.device)
        valid_BS = places_S[None, :] < lengths_B.to(log_probs_BSP.device)[:, None]
        entropy_BS = frame_entropy(log_probs_BSP)
        speech_BS = valid_BS & (log_probs_BSP.argmax(-1) != blank)
        for name, mask in (("entropy", valid_BS), ("speech", speech_BS)):
            self.sums["n" if name == "entropy" else "n_speech"] += mask.sum()
            self.sums[name] += entropy_BS[mask].to(torch.float64).sum()

    def value(self) -> CtcEntropy:
        n, total, n_speech, speech = (float(value) for value in self.sums.values())
        return CtcEntropy(
            frames=total / n if n else math.nan,
            speech=speech / n_speech if n_speech else math.nan,
            speech_share=n_speech / n if n else math.nan,
        )


@dataclass(frozen=True)
class Allocation:
    """``without_audio`` H₀ and ``with_audio`` H₁ in nats per transcript token, over ``tokens``.

    ``resolved`` = H₀ − H₁ is what the audio resolves, ``share`` its part of H₀. ``resolved`` is
    negative if the audio misleads the model.
    """

    without_audio: float
    with_audio: float
    tokens: int

    @property
    def resolved(self) -> float:
        return self.without_audio - self.with_audio

    @property
    def share(self) -> float:
        return self.resolved / self.without_audio if self.without_audio else math.nan


class AllocationSums(Sums):
    """Streaming `Allocation` over the same tokens, scored with and without the audio."""

    def __init__(self, *, device: torch.device | str = "cpu") -> None:
        super().__init__({"n": (), "without": (), "with": ()}, device)

    @torch.no_grad()
    def update(self, nll_without: Tensor, nll_with: Tensor, mask: Tensor | None = None) -> None:
        """Add nlls of the same tokens, any one shape; ``mask`` (bool, same shape) keeps the True.

        Raises ValueError if the shapes differ.
        """
        if nll_without.shape != nll_with.shape:
            raise ValueError(
                f"nll without audio {list(nll_without.shape)}, with {list(nll_with.shape)}"
            )
        keep = slice(None) if mask is None else mask.reshape(-1)
        for name, nll in (("without", nll_without), ("with", nll_with)):
            values = nll.detach().reshape(-1)[keep]
            self.sums[name] += values.to(torch.float64).sum().to(self.sums[name].device)
        self.sums["n"] += len(values)

    def value(self) -> Allocation:
        n = float(self.sums["n"])
        if not n:
            return Allocation(math.nan, math.nan, 0)
        return Allocation(float(self.sums["without"]) / n, float(self.sums["with"]) / n, int(n))
