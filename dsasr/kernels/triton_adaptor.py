"""The adaptor's matrix products as one Triton kernel; imported only where it runs.

`_rows_kernel` gathers the rows of A and scatters those of the result by tables of addresses: row n
of A begins at ``a_first[n]`` and has ``a_width[n]`` elements (zeros follow), row n of the result
begins at ``out_first[n]``. So stacking and masking are addresses of the first product's loads,
writing into the LLM's embeddings those of the second's stores, and, in the backward pass, the
gradient of the padded frames those of a third's. Bias and activation are applied before the store.
The other products of the backward pass have contiguous rows, and are the library's.
"""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsasr.kernels.adaptor import AdaptorWeights, FrameStacks
from dsasr.kernels.differentiable_once import differentiable_once
from dsasr.kernels.kernel_launch import launch

_ACTIVATIONS = {"": 0, "gelu": 1, "silu": 2, "relu": 3}
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # multiplies bfloat16's bits as integers
_GROUP = 8  # row tiles that share their columns' weights in the L2 cache


@triton.jit
def _activate(x, KIND: tl.constexpr):
    if KIND == 1:
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif KIND == 2:
        x = x / (1.0 + tl.exp(-x))
    elif KIND == 3:
        x = tl.where(x < 0, 0.0, x)
    return x


@triton.jit
def _slope(x, KIND: tl.constexpr):
    if KIND == 1:
        area = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        slope = area + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    elif KIND == 2:
        part = 1.0 / (1.0 + tl.exp(-x))
        slope = part * (1.0 + x * (1.0 - part))
    else:
        slope = tl.where(x > 0, 1.0, 0.0)
    return slope


@triton.jit
def _rows_kernel(
    a_ptr, a_first_ptr, a_width_ptr,
    b_ptr, b_stride_n, b_stride_k, bias_ptr,
    out_ptr, out_first_ptr, out_width_ptr, before_ptr,
    rows, columns, depth,
    A_TABLE: tl.constexpr, OUT_TABLE: tl.constexpr, OUT_WIDTH: tl.constexpr,
    ALIGNED: tl.constexpr, EVEN: tl.constexpr,
    BIAS: tl.constexpr, BEFORE: tl.constexpr, KIND: tl.constexpr, WIDE: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """out[n] = activation(a[n] · bᵀ + bias); BEFORE: also store the activation's input.

    ALIGNED: all numbers in the tables are multiples of 16, for loads of 16 bytes. EVEN: depth is a
    multiple of K.
    """
    down = tl.cdiv(rows, M)
    across = tl.cdiv(columns, N)
    program = tl.program_id(0)
    group = program // (GROUP * across)
    high = tl.minimum(down - group * GROUP, GROUP)
    within = program % (GROUP * across)
    row = (group * GROUP + within % high) * M + tl.arange(0, M)
    column = (within // high) * N + tl.arange(0, N)
    row_mask = row < rows
    column_mask = column < columns
    if A_TABLE:
        a_first = tl.load(a_first_ptr + row, mask=row_mask, other=0)
        a_width = tl.load(a_width_ptr + row, mask=row_mask, other=0)
        if ALIGNED:
            a_first = tl.multiple_of(a_first, 16)
            a_width = tl.multiple_of(a_width, 16)
    else:
        a_first = row.to(tl.int64) * depth
        a_width = tl.where(row_mask, depth, 0)
        if EVEN:
            # Without it the loads of A are of single elements: `where` hides what divides depth.
            a_width = tl.multiple_of(a_width, 16)
    b_line = b_ptr + column.to(tl.int64)[None, :] * b_stride_n
    sums = tl.zeros([M, N], tl.float32)
    for first in range(0, depth, K):
        k = first + tl.arange(0, K)
        a_mask = k[None, :] < a_width[:, None]
        a = tl.load(a_ptr + a_first[:, None] + k[None, :], mask=a_mask, other=0.0)
        b_mask = column_mask[None, :]
        if not EVEN:
            b_mask = (k[:, None] < depth) & b_mask
        b = tl.load(b_line + k[:, None] * b_stride_k, mask=b_mask, other=0.0)
        if WIDE:
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        sums = tl.dot(a, b, sums, input_precision="ieee")
    if BIAS:
        sums += tl.load(bias_ptr + column, mask=column_mask, other=0.0).to(tl.float32)[None, :]
    mask = row_mask[:, None] & column_mask[None, :]
    plain = row.to(tl.int64)[:, None] * columns + column[None, :]
    kind = out_ptr.dtype.element_ty
    if BEFORE:
        # As the backward pass does it, which only has the rounded value.
        rounded = sums.to(kind)
        tl.store(before_ptr + plain, rounded, mask=mask)
        sums = rounded.to(tl.float32)
    sums = _activate(sums, KIND)
    if OUT_TABLE:
        out_first = tl.load(out_first_ptr + row, mask=row_mask, other=0)
        if ALIGNED:
            out_first = tl.multiple_of(out_first, 16)
        if OUT_WIDTH:
            out_width = tl.load(out_width_ptr + row, mask=row_mask, other=0)
            if ALIGNED:
                out_width = tl.multiple_of(out_width, 16)
            mask = mask & (column[None, :] < out_width[:, None])
        tl.store(out_ptr + out_first[:, None] + column[None, :], sums.to(kind), mask=mask)
    else:
        tl.store(out_ptr + plain, sums.to(kind), mask=mask)


@triton.jit
def _slope_kernel(before_ptr, grad_ptr, hidden_ptr, count, KIND: tl.constexpr, TILE: tl.constexpr):
    """Recompute the activation from its input, and multiply the gradient by its slope, in place."""
    offset = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    mask = offset < count
    x = tl.load(before_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    kind = hidden_ptr.dtype.element_ty
    tl.store(hidden_ptr + offset, _activate(x, KIND).to(kind), mask=mask)
    tl.store(grad_ptr + offset, (grad * _slope(x, KIND)).to(kind), mask=mask)


def tile_size(
    rows: int, columns: int, depth: int, element_size: int
) -> tuple[dict[str, int], dict[str, int]]:
    """Tile and launch options of a product [rows, depth] · [depth, columns].

    Three stages take 64 or 96 KiB of shared memory on NVIDIA, where all since Ampere have 99, and
    64 on AMD's gfx942, which has no more. 256 columns would halve the reads of A, but the first
    product, with its bias and activation, would spill registers.
    """
    size = {"M": 128, "N": 128, "K": 128 // element_size}
    for name, length in (("M", rows), ("N", columns), ("K", depth)):
        size[name] = min(size[name], max(16, triton.next_power_of_2(length)))
    return size, {"num_warps": 8, "num_stages": 3}


def _rows(
    a: Tensor,
    b_nk: Tensor,
    bias_n: Tensor | None,
    out: Tensor,
    rows: int,
    *,
    a_table: tuple[Tensor, Tensor] | None = None,
    out_table: tuple[Tensor, Tensor | None] | None = None,
    aligned: bool,
    activation: str = "",
    before: Tensor | None = None,
) -> None:
    columns, depth = b_nk.shape
    size, options = tile_size(rows, columns, depth, a.element_size())
    grid = triton.cdiv(rows, size["M"]) * triton.cdiv(columns, size["N"])
    a_first, a_width = a_table or (None, None)
    out_first, out_width = out_table or (None, None)
    launch(
        _rows_kernel, (grid,),
        a, a_first, a_width,
        b_nk, b_nk.stride(0), b_nk.stride(1),
        None if bias_n is None else bias_n.contiguous(),
        out, out_first, out_width, before,
        rows, columns, depth,
        A_TABLE=a_table is not None, OUT_TABLE=out_table is not None,
        OUT_WIDTH=out_width is not None, ALIGNED=aligned, EVEN=depth % size["K"] == 0,
        BIAS=bias_n is not None, BEFORE=before is not None, KIND=_ACTIVATIONS[activation],
        WIDE=_INTERPRETED, GROUP=_GROUP, **size, **options,
    )  # fmt: skip


def run(
    frames_BSE: Tensor,
    lengths_B: Tensor,
    weights: AdaptorWeights,
    *,
    out_LD: Tensor | None = None,
    index_N: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`dispatch.adaptor` with Triton; ``out_LD`` is contiguous and of the weights' dtype."""
    stacks = FrameStacks.of(lengths_B, weights.stack, frames_BSE.shape[1], frames_BSE.device)
    options = stacks, weights.stack, weights.activation
    # One by one, for autograd looks for tensors among a function's arguments only.
    tensors = frames_BSE, weights.w1_HK, weights.b1_H, weights.w2_DH, weights.b2_D
    if out_LD is None:
        return _Adaptor.apply(options, None, None, *tensors), stacks.lengths_B
    if not out_LD.is_contiguous() or out_LD.dtype != weights.w2_DH.dtype:
        raise ValueError("out_LD must be contiguous and of the weights' dtype")
    return _Adaptor.apply(options, out_LD, index_N, *tensors), stacks.lengths_B


class _Adaptor(torch.autograd.Function):
    @staticmethod
    def forward(ctx, options, out_LD, index_N, frames_BSE, w1, b1, w2, b2):
        stacks, stack, activation = options
        frames = _contiguous_frames(frames_BSE)
        rows, width = len(stacks.frames_N), frames.shape[2]
        a_first = stacks.utterance_N * frames.stride(0) + stacks.slot_N * (stack * width)
        a_table = a_first, stacks.frames_N * width
        hidden_NH = frames.new_empty(rows, len(w1))
        before_NH = torch.empty_like(hidden_NH) if any(ctx.needs_input_grad[3:]) else None
        _rows(
            frames, w1, b1, hidden_NH, rows,
            a_table=a_table, activation=activation, before=before_NH,
            aligned=width % 16 == 0 and frames.stride(0) % 16 == 0,
        )  # fmt: skip
        if out_LD is None:
            out_LD, table = frames.new_empty(rows, len(w2)), None
        else:
            ctx.mark_dirty(out_LD)
            table = index_N * out_LD.shape[1], None
        _rows(hidden_NH, w2, b2, out_LD, rows, out_table=table, aligned=len(w2) % 16 == 0)
        ctx.save_for_backward(index_N, frames_BSE, w1, w2, before_NH)
        ctx.options = options
        return out_LD

    @staticmethod
    @differentiable_once("adaptor")
    def backward(ctx, grad_LD):
        index_N, frames_BSE, w1, w2, before_NH = ctx.saved_tensors
        stacks, stack, activation = ctx.options
        _, for_out, _, for_frames, for_w1, for_b1, for_w2, for_b2 = ctx.needs_input_grad
        grad_ND = grad_LD if index_N is None else grad_LD.index_select(0, index_N)
        out_grad = grad_LD.index_fill(0, index_N, 0.0) if for_out else None
        if before_NH is None:
            return None, out_grad, *(None,) * 6
        hidden_NH = torch.empty_like(before_NH)
        before_grad = grad_ND @ w2
        count = before_grad.numel()
        launch(
            _slope_kernel, (triton.cdiv(count, 4096),),
            before_NH, before_grad, hidden_NH, count, KIND=_ACTIVATIONS[activation], TILE=4096,
        )  # fmt: skip
        w2_grad = grad_ND.T @ hidden_NH if for_w2 else None
        b2_grad = grad_ND.sum(0) if for_b2 else None
        b1_grad = before_grad.sum(0) if for_b1 else None
        w1_grad = before_grad.T @ stacks.gather(frames_BSE, stack) if for_w1 else None
        frames_grad = None
        if for_frames:
            frames_grad = torch.zeros_like(frames_BSE, memory_format=torch.contiguous_format)
            _, length, width = frames_grad.shape
            first = (stacks.utterance_N * length + stacks.slot_N * stack) * width
            table = first, stacks.frames_N * width
            _rows(
                before_grad, w1.T, None, frames_grad, len(first),
                out_table=table, aligned=width % 16 == 0,
            )  # fmt: skip
        return None, out_grad, None, frames_grad, w1_grad, b1_grad, w2_grad, b2_grad


def _contiguous_frames(frames_BSE: Tensor) -> Tensor:
    """``frames_BSE`` with contiguous [S, E] utterances, which may have any stride."""
    contiguous = frames_BSE.stride(2) == 1 and frames_BSE.stride(1) == frames_BSE.shape[2]
    return frames_BSE if contiguous else frames_BSE.contiguous()
