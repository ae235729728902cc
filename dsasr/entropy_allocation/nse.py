"""Normalized spectral entropy (NSE) and effective rank of a representation.

λ₁…λ_d are the eigenvalues of the covariance of centered frames X [N, d], p = λ / Σλ:

    H = −Σ pᵢ ln pᵢ   (nats)      NSE = H / ln d ∈ [0, 1]      effective rank = exp(H) ∈ [1, d]

The metric's name is the paper's (arXiv 2604.08003), the formula is **ours**. It normalizes
eigenvalues, that is variances, as Roy & Vetterli's effective rank does on another matrix; RankMe
(arXiv 2210.02885) normalizes singular values and is higher for the same frames. Low: few directions
carry the variance; high: it is spread out.

With N frames the estimate is biased downward, for white frames by about d / (2N) nats: compare
checkpoints on the same frames, and take N ≫ d.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_CHUNK = 16384  # frames converted at a time: bounds the float64 copy


@dataclass(frozen=True)
class SpectralEntropy:
    """``nse`` in [0, 1]; ``entropy`` in nats; ``effective_rank`` = exp(entropy); ``frames`` = N.

    All but ``frames`` are NaN for constant or non-finite frames; ``nse`` is also NaN for d = 1.
    """

    nse: float
    entropy: float
    effective_rank: float
    frames: int


@torch.no_grad()
def nse(x_ND: Tensor) -> SpectralEntropy:
    """The spectral entropy of frames [N, d], from sums in float64. Raises ValueError unless 2-D."""
    if x_ND.ndim != 2:
        raise ValueError(f"expected [N, d], got {list(x_ND.shape)}")
    frames, d = x_ND.shape
    sum_D = torch.zeros(d, dtype=torch.float64, device=x_ND.device)
    sum_DD = torch.zeros(d, d, dtype=torch.float64, device=x_ND.device)
    for chunk in x_ND.split(_CHUNK):
        x = chunk.to(torch.float64)
        sum_D += x.sum(0)
        sum_DD += x.T @ x
    n = max(frames, 1)
    covariance_DD = sum_DD / n - torch.outer(sum_D, sum_D) / n**2
    variance, power = float(covariance_DD.trace()), float(sum_DD.trace()) / n
    # A variance below the rounding error of the raw sums is that of a constant.
    if not math.isfinite(variance) or variance <= 1e-12 * power:
        return SpectralEntropy(math.nan, math.nan, math.nan, frames)
    entropy = spectral_entropy(torch.linalg.eigvalsh(covariance_DD))
    value = entropy / math.log(d) if d > 1 else math.nan
    return SpectralEntropy(value, entropy, math.exp(entropy), frames)


def spectral_entropy(eigenvalues_D: Tensor) -> float:
    """−Σ p ln p in nats of eigenvalues normalized to sum one; values below 0 count as 0."""
    p = eigenvalues_D.to(torch.float64).clamp(min=0)
    return float(torch.special.entr(p / p.sum()).sum())
