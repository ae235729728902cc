"""Entropy of softmax(logits) in one pass over them, and its gradient in one more."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def run(passes: ModuleType, logits: Tensor) -> Tensor:
    """Entropy [...] of logits [..., V] with the passes of ``passes``."""
    rows_NV = logits.reshape(-1, logits.shape[-1])
    return _SoftmaxEntropy.apply(passes, rows_NV).view(logits.shape[:-1])


class _SoftmaxEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, passes, logits_NV):
        saved_3N = passes.row_entropy(logits_NV)
        ctx.passes = passes
        ctx.save_for_backward(logits_NV, saved_3N)
        return saved_3N[2].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_N):
        logits_NV, saved_3N = ctx.saved_tensors
        return None, ctx.passes.row_entropy_gradient(logits_NV, saved_3N, grad_N)
