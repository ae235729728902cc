"""LM head and cross-entropy in one op; the [N, V] logits never exist at once.

Where gradients are wanted, the forward pass makes them too, of the summed loss: some rows at a
time, their logits over all columns become their gradient where they are (`Tiles.row_chunks`). That
is three products in all. The backward pass multiplies by the upstream gradient where that is one
number for all rows (stride 0, as a sum has it).

Any other upstream gradient, per row or through the entropy, is exact as well, but comes of tiles of
few columns (`Tiles.gradients`): the logits again, one pass that turns them into their gradient, and
two products. A forward pass without gradients makes the same tiles: W·h by the library's matrix
product, then one pass that updates each row's online softmax.

With ``persistent`` that product and the chunks' first one are a kernel's, whose logits never come
to memory (`triton_head_statistics`). The tiles of other gradients stay the library's.

The weight itself is saved for the backward pass, no copy and no view of it: a weight that ZeRO-3
partitions may be released in between and gathered again.
"""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType

import torch
from torch import Tensor

from dsasr.kernels import logit_products, torch_logit_tiles
from dsasr.kernels.differentiable_once import differentiable_once
from dsasr.kernels.logit_products import Plan, Tiles

# Logits in a tile. CPU: two tiles of float32 stay in cache. GPU: matrix products fill the device,
# and adding hidden's gradient (N · D) to its sum moves little memory beside a block's tile (by
# arithmetic, not measured).
_CPU_TILE = (1024, 512)
_GPU_TILE_LOGITS = 1 << 26
_GPU_ROWS = 1 << 16
_GPU_MIN_COLUMNS = 4096
# Logits in a chunk of rows. Each chunk adds to the weight's gradient, V · D float32: the larger the
# chunk, the less memory that moves.
_CPU_CHUNK_LOGITS = 1 << 24
_GPU_CHUNK_LOGITS = 1 << 28
_GPU_CHUNK_ROWS = 128  # a chunk has a multiple of these, the matrix units' tiles
# Up to this size whole log-probabilities are cheaper, on a CPU, than tiles computed twice.
_SMALL_LOGITS = 1 << 21


def _tile_size(rows: int, columns: int, device: torch.device) -> tuple[int, int]:
    """Rows and columns of a tile of [rows, columns] logits."""
    if device.type == "cpu":
        return _CPU_TILE
    tile_rows = max(1, min(rows, _GPU_ROWS))
    blocks = -(-columns // max(_GPU_TILE_LOGITS // tile_rows, _GPU_MIN_COLUMNS))
    even = -(-columns // blocks)
    return tile_rows, -(-even // 256) * 256


def chunk_rows(rows: int, columns: int, device: torch.device) -> int:
    """Rows of a chunk, equally many in each, of [rows, columns] logits."""
    on_cpu = device.type == "cpu"
    step = 1 if on_cpu else _GPU_CHUNK_ROWS
    most = max((_CPU_CHUNK_LOGITS if on_cpu else _GPU_CHUNK_LOGITS) // columns // step, 1) * step
    even = -(-rows // max(1, -(-rows // most)))
    return -(-even // step) * step


def run(
    tile_ops: ModuleType,
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    *,
    ignore_index: int,
    bias_V: Tensor | None,
    soft_cap: float | None,
    label_smoothing: float,
    return_entropy: bool,
    return_accuracy: bool,
    persistent: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """`dispatch.linear_cross_entropy` with the tile functions of the module ``tile_ops``."""
    if (
        tile_ops is torch_logit_tiles
        and bias_V is None
        and not soft_cap
        and not label_smoothing
        and logit_products.on_cpu(hidden_ND)
        and len(targets_N) * len(weight_VD) <= _SMALL_LOGITS
    ):
        results = _SmallLinearCrossEntropy.apply(ignore_index, hidden_ND, weight_VD, targets_N)
    else:
        rows, columns = _tile_size(hidden_ND.shape[0], weight_VD.shape[0], hidden_ND.device)
        plan = Plan(rows, columns, ignore_index, soft_cap or None, label_smoothing, persistent)
        tensors = hidden_ND, weight_VD, bias_V, targets_N.contiguous()
        wanted = any(x is not None and x.requires_grad for x in tensors[:3])
        if torch.is_grad_enabled() and wanted and len(hidden_ND):
            # CPUs multiply float32 alone: a copy of the whole weight would be needed.
            if logit_products.on_cpu(hidden_ND) and hidden_ND.itemsize < 4:
                plan = replace(plan, persistent=False)
            else:
                chunk = chunk_rows(len(hidden_ND), len(weight_VD), hidden_ND.device)
                plan = replace(plan, chunk_rows=chunk)
        results = _LinearCrossEntropy.apply(tile_ops, plan, *tensors)
    # The entropy and the hits come with the online softmax at no cost worth skipping.
    nll_N, entropy_N, correct_N = results
    extra = (entropy_N,) * return_entropy + (correct_N,) * return_accuracy
    return (nll_N, *extra) if extra else nll_N


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tile_ops, plan, hidden_ND, weight_VD, bias_V, targets_N):
        ctx.set_materialize_grads(False)
        tiles = Tiles(tile_ops, plan, hidden_ND, weight_VD, bias_V, targets_N)
        ctx.sums = None
        if plan.chunk_rows:
            stats_5N, ctx.sums = tiles.row_chunks(ctx.needs_input_grad[2:5])
        else:
            stats_5N = tiles.statistics()
        m, log_s, entropy_N, target, total = stats_5N
        smoothing = plan.smoothing
        nll_N = log_s + (m - target)
        if smoothing:
            nll_N = log_s + (1 - smoothing) * (m - target)
            nll_N += smoothing * (m - total / weight_VD.shape[0])
        ignored_N = targets_N == plan.ignore_index
        nll_N.masked_fill_(ignored_N, 0.0)
        masked_entropy_N = entropy_N.masked_fill(ignored_N, 0.0)
        correct_N = (target == m) & ~ignored_N
        # Not those of chunks: tiles round their products otherwise, and p would not sum to 1.
        saved_3N = stats_5N[:3].clone() if ctx.sums is None else None
        ctx.save_for_backward(hidden_ND, weight_VD, bias_V, targets_N, saved_3N)
        ctx.tile_ops, ctx.plan = tile_ops, replace(plan, persistent=False)
        ctx.mark_non_differentiable(correct_N)
        return nll_N, masked_entropy_N, correct_N

    @staticmethod
    @differentiable_once("linear_cross_entropy")
    def backward(ctx, nll_grad_N, entropy_grad_N, _):
        hidden_ND, weight_VD, bias_V, targets_N, saved_3N = ctx.saved_tensors
        if nll_grad_N is None and entropy_grad_N is None:
            return (None,) * 6
        sums, ctx.sums = ctx.sums, None  # a second backward pass makes its own
        if sums is not None and entropy_grad_N is None and _is_uniform(nll_grad_N):
            return None, None, *sums.times(nll_grad_N[0], weight_VD.dtype), None
        del sums
        tiles = Tiles(ctx.tile_ops, ctx.plan, hidden_ND, weight_VD, bias_V, targets_N)
        needed = ctx.needs_input_grad[2:5]
        if saved_3N is None:
            saved_3N = tiles.statistics()[:3]
        grads = tiles.gradients(saved_3N, nll_grad_N, entropy_grad_N, needed)
        return None, None, *grads, None


def _is_uniform(grad_N: Tensor) -> bool:
    """Whether it is one number for all rows; judged by its stride, for its values are on a GPU."""
    return len(grad_N) == 1 or grad_N.stride(0) == 0


class _SmallLinearCrossEntropy(torch.autograd.Function):
    """The plain case at a size where the log-probabilities may as well exist."""

    @staticmethod
    def forward(ctx, ignore_index, hidden_ND, weight_VD, targets_N):
        ctx.set_materialize_grads(False)
        dtype = torch.promote_types(hidden_ND.dtype, torch.float32)
        log_p_NV = (hidden_ND.to(dtype) @ weight_VD.to(dtype).T).log_softmax(1)
        ignored_N = targets_N == ignore_index
        index_N1 = targets_N.masked_fill(ignored_N, 0)[:, None]
        target_N = log_p_NV.gather(1, index_N1).squeeze(1)
        correct_N = (target_N == log_p_NV.amax(1)).masked_fill_(ignored_N, False)
        entropy_N = log_p_NV.exp().mul_(log_p_NV).sum(1).neg_()
        ctx.save_for_backward(hidden_ND, weight_VD, log_p_NV, entropy_N, ignored_N, index_N1)
        ctx.mark_non_differentiable(correct_N)
        nll_N = target_N.neg_().masked_fill_(ignored_N, 0.0)
        return nll_N, entropy_N.masked_fill(ignored_N, 0.0), correct_N

    @staticmethod
    @differentiable_once("linear_cross_entropy")
    def backward(ctx, nll_grad_N, entropy_grad_N, _):
        hidden_ND, weight_VD, log_p_NV, entropy_N, ignored_N, index_N1 = ctx.saved_tensors
        if nll_grad_N is None and entropy_grad_N is None:
            return (None,) * 4
        dz_NV = log_p_NV.exp()
        if entropy_grad_N is None:
            nll = nll_grad_N.masked_fill(ignored_N, 0.0)[:, None]
            dz_NV.mul_(nll)
        else:
            entropy = entropy_grad_N.masked_fill(ignored_N, 0.0)[:, None]
            nll = torch.zeros_like(entropy)
            if nll_grad_N is not None:
                nll = nll_grad_N.masked_fill(ignored_N, 0.0)[:, None]
            dz_NV.mul_((log_p_NV + entropy_N[:, None]).mul_(-entropy).add_(nll))
        dz_NV.scatter_add_(1, index_N1, -nll)
        hidden_grad = weight_grad = None
        if ctx.needs_input_grad[1]:
            hidden_grad = (dz_NV @ weight_VD.to(dz_NV.dtype)).to(hidden_ND.dtype)
        if ctx.needs_input_grad[2]:
            weight_grad = (dz_NV.T @ hidden_ND.to(dz_NV.dtype)).to(weight_VD.dtype)
        return None, hidden_grad, weight_grad, None
