"""Normalized spectral entropy: over how many directions a representation spreads its variance.

λ₁…λ_d are the eigenvalues of the covariance of centered frames X [N, d], p = λ / Σλ:

    H = −Σ pᵢ ln pᵢ   (nats)      NSE = H / ln d ∈ [0, 1]      effective rank = exp(H) ∈ [1, d]

The metric's name is the paper's (arXiv 2604.08003), the formula is ours. It normalizes eigenvalues,
that is variances, as Roy & Vetterli's effective rank does on another matrix; RankMe (arXiv
2210.02885) normalizes singular values and is higher for the same frames. Low: few directions carry
the variance; high: it is spread out.

With N frames the estimate lies below the truth, for white frames by about d / (2N) nats: compare
checkpoints on the same frames, and take N ≫ d.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dsasr.entropy_allocation.accumulators import Sums

_CHUNK = 16384


@dataclass(frozen=True)
class Spectrum:
    """``nse`` in [0, 1]; ``entropy`` in nats; ``effective_rank`` = exp(entropy); ``frames`` = N.

    ``variance`` is the trace of the covariance. All but it and ``frames`` are NaN for constant or
    non-finite frames; ``nse`` is also NaN for d = 1, where no spread is possible.
    """

    nse: float
    entropy: float
    effective_rank: float
    variance: float
    frames: int


class CovarianceSums(Sums):
    """Streaming N, Σx and Σxxᵀ of frames [N, d] in float64: (d² + d) · 8 bytes."""

    def __init__(self, d: int, *, device: torch.device | str = "cpu") -> None:
        self.d = d
        super().__init__({"n": (), "x": (d,), "xx": (d, d)}, device)

    @torch.no_grad()
    def update(self, x_ND: Tensor) -> None:
        """Add frames. Raises ValueError unless [N, d]."""
        if x_ND.ndim != 2 or x_ND.shape[1] != self.d:
            raise ValueError(f"expected [N, {self.d}], got {list(x_ND.shape)}")
        sums = self.sums
        for start in range(0, len(x_ND), _CHUNK):
            x = x_ND[start : start + _CHUNK].to(sums["x"].device, torch.float64)
            sums["n"] += len(x)
            sums["x"] += x.sum(0)
            sums["xx"] += x.T @ x

    def covariance(self) -> Tensor:
        """Biased covariance [d, d] (divided by N), float64."""
        n = self.sums["n"].clamp(min=1)
        return self.sums["xx"] / n - torch.outer(self.sums["x"], self.sums["x"]) / n**2

    def value(self) -> Spectrum:
        """The spectrum's measures."""
        covariance = self.covariance()
        frames, variance = int(self.sums["n"]), float(covariance.trace())
        power = float(self.sums["xx"].trace()) / max(frames, 1)
        # Below the rounding of the raw sums there is no spread, only a constant.
        if not math.isfinite(variance) or variance <= 1e-12 * power:
            return Spectrum(math.nan, math.nan, math.nan, variance, frames)
        entropy = spectral_entropy(torch.linalg.eigvalsh(covariance))
        nse = entropy / math.log(self.d) if self.d > 1 else math.nan
        return Spectrum(nse, entropy, math.exp(entropy), variance, frames)


def spectral_entropy(eigenvalues_D: Tensor) -> float:
    """−Σ p ln p in nats of eigenvalues normalized to sum one; rounding below zero counts as 0."""
    p = eigenvalues_D.to(torch.float64).clamp(min=0)
    return float(torch.special.entr(p / p.sum()).sum())


def nse(x_ND: Tensor) -> Spectrum:
    """`Spectrum` of whole frames [N, d]."""
    sums = CovarianceSums(x_ND.shape[1], device=x_ND.device)
    sums.update(x_ND)
    return sums.value()
