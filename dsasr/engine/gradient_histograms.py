"""Histograms of a branch's gradients by part, between the backward pass and the step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

# Edges of the bins in log₁₀ |gradient|; what is smaller or larger, zeros too, is in the end bins.
EDGES = np.linspace(-12.0, 3.0, 61)


def gradient_histograms(parts: Mapping[str, Sequence[nn.Parameter]]) -> dict[str, list[int]]:
    """Counts of log₁₀ |gradient| between `EDGES`, by part; collective.

    Gradients are means over the ranks, before clipping. One parameter at a time is gathered, which
    needs memory for the largest one in fp32.
    """
    from deepspeed.utils import safe_get_full_grad

    counts_of = {}
    for part, parameters in parts.items():
        counts = torch.zeros(len(EDGES) - 1, dtype=torch.int64)
        for parameter in parameters:
            gradient = safe_get_full_grad(parameter)
            if gradient is not None:
                counts += log10_counts(gradient)
        counts_of[part] = counts.tolist()
    return counts_of


def log10_counts(gradient: Tensor) -> Tensor:
    """Counts [bins] of log₁₀ |gradient| between `EDGES`, of the finite ones."""
    size = gradient.detach().float().abs().flatten()
    size = size[size.isfinite()]
    width = float(EDGES[1] - EDGES[0])
    bins = torch.log10(size.clamp_min(1e-38)).sub_(float(EDGES[0])).div_(width).floor_()
    bins = bins.clamp_(0, len(EDGES) - 2).long()
    return torch.bincount(bins, minlength=len(EDGES) - 1).cpu()
