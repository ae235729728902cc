"""The two functions of a tile of logits, in torch: softmax statistics, and gradients.

A tile z_nv has the logits of n rows and of v columns beginning at ``start``. ``carry_5n`` is the
online softmax of the same rows over the earlier columns:

    m = max z,  s = Σ e^(z−m),  t = Σ (z−m) e^(z−m),  the target's z,  Σ z

m starts at −inf, so that rows of very negative logits do not underflow. From these,
ln Z = m + ln s, and the entropy is ln s − t/s (nats). Both functions overwrite z_nv.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Stands for −inf where 0 · −inf must be 0: e^x underflows to 0 far above it, in float64 too.
_NEVER = -1000.0
_TILE_LOGITS = 1 << 19  # of whole rows on a CPU: they stay in its cache
_GPU_TILE_LOGITS = 1 << 26


def logits(z_nv: Tensor, bias_v: Tensor | None, soft_cap: float | None) -> Tensor:
    """Bias and soft cap applied to W·h, in place."""
    if bias_v is not None:
        z_nv.add_(bias_v)
    if soft_cap:
        z_nv.div_(soft_cap).tanh_().mul_(soft_cap)
    return z_nv


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
    """Update ``carry_5n`` with a tile. ``total``: Σ z too; ``infinite``: z may contain −inf."""
    logits(z_nv, bias_v, soft_cap)
    m, s, t, target, z_sum = carry_5n
    if targets_n is not None:
        column_n, inside_n = _target_columns(targets_n, start, z_nv.shape[1])
        target_z = z_nv.gather(1, column_n[:, None]).squeeze(1)
        target.add_(target_z.masked_fill_(~inside_n, 0.0))
    if total:
        z_sum.add_(z_nv.sum(1))
    top = torch.maximum(m, z_nv.amax(1))
    base = top.masked_fill(top.isneginf(), 0.0)
    z_nv.sub_(base[:, None])
    if infinite:
        z_nv.clamp_(min=_NEVER)
    e_nv = torch.exp(z_nv, out=scratch_nv)
    shift = (m - base).clamp_(min=_NEVER)
    fade = shift.exp()
    t.add_(shift.mul_(s)).mul_(fade)
    s.mul_(fade).add_(e_nv.sum(1))
    t.add_(e_nv.mul_(z_nv).sum(1))
    m.copy_(top)


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
    """``out_nv`` = p · (a + b · ln p) − c · [target] − k, times the soft cap's slope.

    It may have a lower precision than z_nv.

    ``rows_6n``: m, ln s, a, b, c, k. ``entropy`` and ``smooth`` False promise that b and k are 0.
    """
    logits(z_nv, bias_v, soft_cap)
    m, log_s, a, b, c, k = (row[:, None] for row in rows_6n)
    slope_nv = 1 - (z_nv / soft_cap).square_() if soft_cap else None
    base = m.masked_fill(m.isneginf(), 0.0)
    buffer_nv = out_nv if out_nv.dtype == z_nv.dtype else None
    if entropy:
        z_nv.sub_(base).sub_(log_s)
        if infinite:
            z_nv.clamp_(min=_NEVER)
        p_nv = torch.exp(z_nv, out=buffer_nv)
        p_nv.mul_(z_nv.mul_(b).add_(a))
    else:
        p_nv = torch.exp(z_nv.sub_(base), out=buffer_nv)
        p_nv.mul_(a * (-log_s).exp())
    if smooth:
        p_nv.sub_(k)
    if targets_n is not None:
        column_n, inside_n = _target_columns(targets_n, start, z_nv.shape[1])
        p_nv.scatter_add_(1, column_n[:, None], (-c).masked_fill_(~inside_n[:, None], 0.0))
    if slope_nv is not None:
        p_nv.mul_(slope_nv)
    return p_nv if buffer_nv is not None else out_nv.copy_(p_nv)


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
    """``out_nV`` = scale · ∂nll/∂z of whole rows, 0 in those of ``ignore_index``.

    ``stats_5n`` becomes m, ln s, the entropy, the target's z and, with ``smoothing``, Σ z.
    ``out_nV`` may lie in z_nV's memory, row by row, and have a lower precision.
    """
    for rows in _row_tiles(z_nV):
        _row_gradients(
            logits(z_nV[rows], bias_v, soft_cap), stats_5n[:, rows], targets_n[rows],
            targets_n[rows] != ignore_index, soft_cap, smoothing, scale, infinite, out_nV[rows],
        )  # fmt: skip
    return out_nV


def _row_gradients(
    z_nV: Tensor,
    stats_5n: Tensor,
    targets_n: Tensor,
    valid_n: Tensor,
    soft_cap: float | None,
    smoothing: float,
    scale: float,
    infinite: bool,
    out_nV: Tensor,
) -> None:
    column_n1 = targets_n.masked_fill(~valid_n, 0)[:, None]
    m, log_s, entropy, target, z_sum = stats_5n
    torch.amax(z_nV, 1, out=m)
    target.copy_(z_nV.gather(1, column_n1).squeeze(1))
    if smoothing:
        torch.sum(z_nV, 1, out=z_sum)
    slope_nV = 1 - (z_nV / soft_cap).square_() if soft_cap else None
    z_nV.sub_(m.masked_fill(m.isneginf(), 0.0)[:, None])
    if infinite:
        z_nV.clamp_(min=_NEVER)
    e_nV = z_nV.exp()
    s = e_nV.sum(1)
    t = z_nV.mul_(e_nV).sum(1)
    torch.log(s, out=log_s)
    torch.sub(log_s, t / s, out=entropy)
    a = valid_n.to(m.dtype) * scale
    p_nV = torch.mul(e_nV, (a / s)[:, None], out=z_nV if out_nV.dtype == z_nV.dtype else e_nV)
    if smoothing:
        p_nV.sub_((a * (smoothing / z_nV.shape[1]))[:, None])
    p_nV.scatter_add_(1, column_n1, (-(1 - smoothing) * a).to(p_nV.dtype)[:, None])
    if slope_nV is not None:
        p_nV.mul_(slope_nV)
    if out_nV.data_ptr() != p_nV.data_ptr():
        out_nV.copy_(p_nV)


def _target_columns(targets_n: Tensor, start: int, columns: int) -> tuple[Tensor, Tensor]:
    """Column in the tile of each row's target (0 if it is outside), and whether it is inside."""
    column_n = targets_n - start
    inside_n = (column_n >= 0) & (column_n < columns)
    return column_n.masked_fill_(~inside_n, 0), inside_n


def row_entropy(logits_NV: Tensor) -> Tensor:
    """[3, N]: m, ln s and the entropy of each row, in tiles of rows."""
    dtype = torch.promote_types(logits_NV.dtype, torch.float32)
    carry_5N = logits_NV.new_zeros(5, len(logits_NV), dtype=dtype)
    carry_5N[0] = -torch.inf
    for rows in _row_tiles(logits_NV):
        z_nv = logits_NV[rows].to(dtype, copy=True)
        update(z_nv, carry_5N[:, rows], infinite=True)
    m, s, t = carry_5N[:3]
    log_s = s.log()
    return torch.stack([m, log_s, log_s - t / s])


def row_entropy_gradient(logits_NV: Tensor, saved_3N: Tensor, grad_N: Tensor) -> Tensor:
    """∂H/∂z = −p (ln p + H), times the upstream gradient, in the logits' dtype."""
    m, log_s, entropy_N = saved_3N
    grad_N = grad_N.to(m.dtype)
    zero_N = torch.zeros_like(m)
    rows_6N = torch.stack([m, log_s, -grad_N * entropy_N, -grad_N, zero_N, zero_N])
    out_NV = torch.empty_like(logits_NV, memory_format=torch.contiguous_format)
    for rows in _row_tiles(logits_NV):
        z_nv = logits_NV[rows].to(m.dtype, copy=True)
        out_nv = torch.empty_like(z_nv)
        out_NV[rows] = gradient(z_nv, rows_6N[:, rows], infinite=True, out_nv=out_nv)
    return out_NV


def _row_tiles(logits_NV: Tensor) -> list[slice]:
    rows, columns = logits_NV.shape
    on_cpu = logits_NV.device.type == "cpu"
    step = max(1, (_TILE_LOGITS if on_cpu else _GPU_TILE_LOGITS) // columns)
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]
