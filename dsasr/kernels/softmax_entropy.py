"""Entropy of softmax(logits) in one pass over the logits, and its gradient in another."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from dsasr.kernels.differentiable_once import differentiable_once


def run(tile_ops: ModuleType, logits: Tensor) -> Tensor:
    """`dispatch.softmax_entropy` with the tile functions of the module ``tile_ops``."""
    rows_NV = logits.reshape(-1, logits.shape[-1])
    return _SoftmaxEntropy.apply(tile_ops, rows_NV).view(logits.shape[:-1])


class _SoftmaxEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tile_ops, logits_NV):
        saved_3N = tile_ops.row_entropy(logits_NV)
        ctx.tile_ops = tile_ops
        ctx.save_for_backward(logits_NV, saved_3N)
        return saved_3N[2].clone()

    @staticmethod
    @differentiable_once("softmax_entropy")
    def backward(ctx, grad_N):
        logits_NV, saved_3N = ctx.saved_tensors
        return None, ctx.tile_ops.row_entropy_gradient(logits_NV, saved_3N, grad_N)
