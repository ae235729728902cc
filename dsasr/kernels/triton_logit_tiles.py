"""The two functions of `torch_logit_tiles` as Triton kernels; imported only where they run.

One program has a few rows. `_update_kernel` loops over their columns once, with m, s and t of each
row in registers; columns beyond the edge are −inf, and add nothing to s or t. Nothing is autotuned:
an update that runs several times to be timed would count its tile several times.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsasr.kernels.kernel_launch import launch

_NEVER = tl.constexpr(-1000.0)  # as in torch_logit_tiles
_TILE = 8192  # elements of a program's tile
_WARPS = 8


@triton.jit
def _capped(z, cap):
    # tanh; where e^(2x) overflows to inf, the result is 1, as it should be.
    return cap * (1.0 - 2.0 / (1.0 + tl.exp(2.0 * (z / cap))))


@triton.jit
def _update_kernel(
    z_ptr, z_stride, columns, rows,
    carry_ptr, carry_stride, out_ptr,
    targets_ptr, start, bias_ptr, cap,
    TARGETS: tl.constexpr, BIAS: tl.constexpr, CAP: tl.constexpr, TOTAL: tl.constexpr,
    FINISH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Update the carry; with FINISH, start from an empty one and store m, ln s and the entropy."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_mask = row < rows
    m = tl.full([ROWS], float("-inf"), tl.float32)
    s = tl.zeros([ROWS], tl.float32)
    t = tl.zeros([ROWS], tl.float32)
    target = tl.zeros([ROWS], tl.float32)
    z_sum = tl.zeros([ROWS], tl.float32)
    if not FINISH:
        m = tl.load(carry_ptr + row, mask=row_mask, other=float("-inf"))
        s = tl.load(carry_ptr + carry_stride + row, mask=row_mask, other=0.0)
        t = tl.load(carry_ptr + 2 * carry_stride + row, mask=row_mask, other=0.0)
        target = tl.load(carry_ptr + 3 * carry_stride + row, mask=row_mask, other=0.0)
        z_sum = tl.load(carry_ptr + 4 * carry_stride + row, mask=row_mask, other=0.0)
    if TARGETS:
        target_column = tl.load(targets_ptr + row, mask=row_mask, other=-1) - start
    line = z_ptr + row.to(tl.int64)[:, None] * z_stride
    for first in range(0, columns, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        column_mask = column < columns
        mask = row_mask[:, None] & column_mask[None, :]
        z = tl.load(line + column[None, :], mask=mask, other=0.0).to(tl.float32)
        if BIAS:
            z += tl.load(bias_ptr + column, mask=column_mask, other=0.0)[None, :]
        if CAP:
            z = _capped(z, cap)
        if TARGETS:
            target += tl.sum(tl.where(column[None, :] == target_column[:, None], z, 0.0), 1)
        if TOTAL:
            z_sum += tl.sum(tl.where(mask, z, 0.0), 1)
        z = tl.where(column_mask[None, :], z, float("-inf"))
        top = tl.maximum(m, tl.max(z, 1))
        base = tl.where(top == float("-inf"), 0.0, top)
        z -= base[:, None]
        e = tl.exp(z)
        shift = tl.maximum(m - base, _NEVER)
        fade = tl.exp(shift)
        t = fade * (t + shift * s) + tl.sum(e * tl.maximum(z, _NEVER), 1)
        s = fade * s + tl.sum(e, 1)
        m = top
    if FINISH:
        log_s = tl.log(s)
        tl.store(out_ptr + row, m, mask=row_mask)
        tl.store(out_ptr + rows + row, log_s, mask=row_mask)
        tl.store(out_ptr + 2 * rows + row, log_s - t / s, mask=row_mask)
    else:
        tl.store(carry_ptr + row, m, mask=row_mask)
        tl.store(carry_ptr + carry_stride + row, s, mask=row_mask)
        tl.store(carry_ptr + 2 * carry_stride + row, t, mask=row_mask)
        if TARGETS:
            tl.store(carry_ptr + 3 * carry_stride + row, target, mask=row_mask)
        if TOTAL:
            tl.store(carry_ptr + 4 * carry_stride + row, z_sum, mask=row_mask)


@triton.jit
def _gradient_kernel(
    z_ptr, z_stride, columns, rows,
    factors_ptr, factors_stride, out_ptr, out_stride,
    targets_ptr, start, bias_ptr, cap,
    TARGETS: tl.constexpr, BIAS: tl.constexpr, CAP: tl.constexpr, ENTROPY: tl.constexpr,
    SMOOTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    row_mask = row < rows
    column_mask = column < columns
    mask = row_mask[:, None] & column_mask[None, :]
    line = row.to(tl.int64)[:, None]
    z = tl.load(z_ptr + line * z_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
    if BIAS:
        z += tl.load(bias_ptr + column, mask=column_mask, other=0.0)[None, :]
    if CAP:
        z = _capped(z, cap)
    m = tl.load(factors_ptr + row, mask=row_mask, other=0.0)
    log_s = tl.load(factors_ptr + factors_stride + row, mask=row_mask, other=0.0)
    a = tl.load(factors_ptr + 2 * factors_stride + row, mask=row_mask, other=0.0)
    base = tl.where(m == float("-inf"), 0.0, m)
    log_p = z - base[:, None] - log_s[:, None]
    p = tl.exp(log_p)
    if ENTROPY:
        b = tl.load(factors_ptr + 3 * factors_stride + row, mask=row_mask, other=0.0)
        grad = p * (a[:, None] + b[:, None] * tl.maximum(log_p, _NEVER))
    else:
        grad = p * a[:, None]
    if TARGETS:
        c = tl.load(factors_ptr + 4 * factors_stride + row, mask=row_mask, other=0.0)
        target_column = tl.load(targets_ptr + row, mask=row_mask, other=-1) - start
        grad -= tl.where(column[None, :] == target_column[:, None], c[:, None], 0.0)
    if SMOOTH:
        k = tl.load(factors_ptr + 5 * factors_stride + row, mask=row_mask, other=0.0)
        grad -= k[:, None]
    if CAP:
        grad *= 1.0 - (z / cap) * (z / cap)
    out = out_ptr + line * out_stride + column[None, :]
    tl.store(out, grad.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _row_gradient_kernel(
    z_ptr, z_stride, columns,
    stats_ptr, stats_stride, out_ptr, out_stride,
    targets_ptr, ignore_index, bias_ptr, cap, smoothing, scale,
    BIAS: tl.constexpr, CAP: tl.constexpr, SMOOTH: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A row: its statistics, then its gradient. The second reading comes out of the L2 cache.

    The gradient may lie in the logits' memory, with elements of half their size: what it takes is
    behind what is still to be read, but for the first columns, whose threads wait for each other.
    """
    row = tl.program_id(0)
    line = row.to(tl.int64)
    target_column = tl.load(targets_ptr + row)
    m = float("-inf")
    s = 0.0
    t = 0.0
    target = 0.0
    z_sum = 0.0
    for first in range(0, columns, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        mask = column < columns
        z = tl.load(z_ptr + line * z_stride + column, mask=mask, other=0.0)
        if BIAS:
            z += tl.load(bias_ptr + column, mask=mask, other=0.0)
        if CAP:
            z = _capped(z, cap)
        target += tl.sum(tl.where(column == target_column, z, 0.0), 0)
        if SMOOTH:
            z_sum += tl.sum(tl.where(mask, z, 0.0), 0)
        z = tl.where(mask, z, float("-inf"))
        top = tl.maximum(m, tl.max(z, 0))
        base = tl.where(top == float("-inf"), 0.0, top)
        z -= base
        e = tl.exp(z)
        shift = tl.maximum(m - base, _NEVER)
        fade = tl.exp(shift)
        t = fade * (t + shift * s) + tl.sum(e * tl.maximum(z, _NEVER), 0)
        s = fade * s + tl.sum(e, 0)
        m = top
    log_s = tl.log(s)
    tl.store(stats_ptr + row, m)
    tl.store(stats_ptr + stats_stride + row, log_s)
    tl.store(stats_ptr + 2 * stats_stride + row, log_s - t / s)
    tl.store(stats_ptr + 3 * stats_stride + row, target)
    tl.store(stats_ptr + 4 * stats_stride + row, z_sum)
    a = tl.where(target_column == ignore_index, 0.0, scale)
    shift = tl.where(m == float("-inf"), 0.0, m) + log_s
    for first in range(0, columns, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        mask = column < columns
        z = tl.load(z_ptr + line * z_stride + column, mask=mask, other=0.0)
        if BIAS:
            z += tl.load(bias_ptr + column, mask=mask, other=0.0)
        if CAP:
            z = _capped(z, cap)
        grad = a * tl.exp(z - shift)
        grad -= tl.where(column == target_column, a * (1.0 - smoothing), 0.0)
        if SMOOTH:
            grad -= a * smoothing / columns
        if CAP:
            grad *= 1.0 - (z / cap) * (z / cap)
        tl.debug_barrier()
        tl.store(out_ptr + line * out_stride + column, grad.to(out_ptr.dtype.element_ty), mask=mask)


def _tile(columns: int) -> tuple[int, int]:
    """Rows and columns of a program's tile: powers of two."""
    wide = min(_TILE, triton.next_power_of_2(columns))
    return min(_TILE // wide, 64), wide


def update(
    z_nv: Tensor,
    carry_5n: Tensor,
    targets_n: Tensor | None = None,
    *,
    start: int = 0,
    bias_v: Tensor | None = None,
    soft_cap: float | None = None,
    total: bool = False,
    infinite: bool = False,
    scratch_nv: Tensor | None = None,
) -> None:
    """`torch_logit_tiles.update`; leaves z_nv unchanged, and needs no scratch."""
    rows, columns = z_nv.shape
    high, wide = _tile(columns)
    launch(
        _update_kernel, (triton.cdiv(rows, high),),
        z_nv, z_nv.stride(0), columns, rows,
        carry_5n, carry_5n.stride(0), carry_5n,
        targets_n, start, bias_v, float(soft_cap or 1.0),
        TARGETS=targets_n is not None, BIAS=bias_v is not None, CAP=soft_cap is not None,
        TOTAL=total, FINISH=False, ROWS=high, COLUMNS=wide, num_warps=_WARPS,
    )  # fmt: skip


def gradient(
    z_nv: Tensor,
    rows_6n: Tensor,
    targets_n: Tensor | None = None,
    *,
    start: int = 0,
    bias_v: Tensor | None = None,
    soft_cap: float | None = None,
    entropy: bool = True,
    smooth: bool = False,
    infinite: bool = False,
    out_nv: Tensor,
) -> Tensor:
    """`torch_logit_tiles.gradient`; leaves z_nv unchanged."""
    rows, columns = z_nv.shape
    high, wide = _tile(columns)
    launch(
        _gradient_kernel, (triton.cdiv(rows, high), triton.cdiv(columns, wide)),
        z_nv, z_nv.stride(0), columns, rows,
        rows_6n, rows_6n.stride(0), out_nv, out_nv.stride(0),
        targets_n, start, bias_v, float(soft_cap or 1.0),
        TARGETS=targets_n is not None, BIAS=bias_v is not None, CAP=soft_cap is not None,
        ENTROPY=entropy, SMOOTH=smooth, ROWS=high, COLUMNS=wide, num_warps=_WARPS,
    )  # fmt: skip
    return out_nv


def row_gradients(
    z_nV: Tensor,
    stats_5n: Tensor,
    targets_n: Tensor,
    *,
    ignore_index: int,
    bias_v: Tensor | None = None,
    soft_cap: float | None = None,
    smoothing: float = 0.0,
    scale: float = 1.0,
    infinite: bool = False,
    out_nV: Tensor,
) -> Tensor:
    """`torch_logit_tiles.row_gradients`; z_nV and ``stats_5n`` are float32."""
    rows, columns = z_nV.shape
    launch(
        _row_gradient_kernel, (rows,),
        z_nV, z_nV.stride(0), columns,
        stats_5n, stats_5n.stride(0), out_nV, out_nV.stride(0),
        targets_n, ignore_index, bias_v, float(soft_cap or 1.0), smoothing, scale,
        BIAS=bias_v is not None, CAP=soft_cap is not None, SMOOTH=smoothing > 0,
        COLUMNS=_tile(columns)[1], num_warps=_WARPS,
    )  # fmt: skip
    return out_nV


def row_entropy(logits_NV: Tensor) -> Tensor:
    """[3, N]: m, ln s and the entropy of each row, in one pass."""
    logits_NV = _contiguous_rows(logits_NV)
    rows, columns = logits_NV.shape
    high, wide = _tile(columns)
    out_3N = logits_NV.new_empty(3, rows, dtype=torch.float32)
    launch(
        _update_kernel, (triton.cdiv(rows, high),),
        logits_NV, logits_NV.stride(0), columns, rows,
        out_3N, 0, out_3N,
        None, 0, None, 1.0,
        TARGETS=False, BIAS=False, CAP=False, TOTAL=False, FINISH=True,
        ROWS=high, COLUMNS=wide, num_warps=_WARPS,
    )  # fmt: skip
    return out_3N


def row_entropy_gradient(logits_NV: Tensor, saved_3N: Tensor, grad_N: Tensor) -> Tensor:
    """∂H/∂z = −p (ln p + H), times the upstream gradient, in the logits' dtype."""
    logits_NV = _contiguous_rows(logits_NV)
    m, log_s, entropy_N = saved_3N
    grad_N = grad_N.float()
    rows_4N = torch.stack([m, log_s, -grad_N * entropy_N, -grad_N])
    out_NV = torch.empty_like(logits_NV, memory_format=torch.contiguous_format)
    return gradient(logits_NV, rows_4N, out_nv=out_NV)


def _contiguous_rows(logits_NV: Tensor) -> Tensor:
    """``logits_NV`` with contiguous rows, which may have any stride."""
    return logits_NV if logits_NV.stride(1) == 1 else logits_NV.contiguous()
