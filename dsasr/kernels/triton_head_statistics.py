"""An LM head's product whose epilogue keeps its softmax statistics and not its logits.

`_product_kernel` is persistent: as many programs as the device has processors take tiles of
[N, V] logits in turn. A tile stays in registers: of each of its rows only

    m = max z,  s = Σ e^(z−m),  t = Σ (z−m) e^(z−m),  and Σ z with label smoothing

are stored for each block of columns, and z where the tile has the row's target. `_merge` joins the
blocks as an online softmax does. For gradients it also stores e^(z−m) in the inputs' dtype;
`_gradient_kernel` turns that into ∂nll/∂z where it is, when s is known (rounded twice, then). So a
logit takes no memory traffic, or 6 bytes in bf16 with the gradient, in place of 8, or of 10 to 14.

Operands come by TMA where the device has it and rows begin on 16 bytes, else by pointers. On
Blackwell with tcgen05 the loads, the products and the epilogue run in warps of their own. No GPU
has run any of it: the values are the interpreter's, registers and instructions the compiler's.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from dsasr.kernels.kernel_launch import launch
from dsasr.kernels.triton_logit_tiles import _NEVER, _capped

_LOWEST = tl.constexpr(-1e15)  # of columns beyond the edge: e^x is 0, 0 · x too, x · x finite
_GROUP = 8  # row tiles that share their columns' weights in the L2 cache
_GRADIENT_TILE = 8192  # elements of a program's tile
_GRADIENT_WARPS = 8
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # multiplies bfloat16's bits as integers


@triton.jit
def _block_statistics(
    z, row, block, tiles_ptr, target_z_ptr, targets_ptr, bias_ptr, out_ptr, out_stride,
    rows, columns, cap, scale,
    BIAS: tl.constexpr, CAP: tl.constexpr, TOTAL: tl.constexpr, OUT: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Statistics of z, [rows, N] logits of the columns from ``block`` · N on."""
    within = tl.arange(0, N)
    column = block * N + within
    row_mask = row < rows
    column_mask = column < columns
    if BIAS:
        z += tl.load(bias_ptr + column, mask=column_mask, other=0.0)[None, :]
    if CAP:
        z = _capped(z, cap)
    target = (tl.load(targets_ptr + row, mask=row_mask, other=-1) - block * N).to(tl.int32)
    target_z = tl.sum(tl.where(within[None, :] == target[:, None], z, 0.0), 1)
    tl.store(target_z_ptr + row, target_z, mask=row_mask & (target >= 0) & (target < N))
    plane = tl.cdiv(columns, N).to(tl.int64) * rows
    tiles = tiles_ptr + block.to(tl.int64) * rows + row
    mask = row_mask & (block * N < columns)
    if TOTAL:
        tl.store(tiles + 3 * plane, tl.sum(z, 1), mask=mask)  # beyond the edge z is 0
    z = tl.where(column_mask[None, :], z, _LOWEST)
    m = tl.max(z, 1)
    base = m
    if BIAS:  # which may be −inf
        base = tl.where(m == float("-inf"), 0.0, m)
    z -= base[:, None]
    if BIAS:
        z = tl.maximum(z, _NEVER)
    e = tl.exp(z)
    tl.store(tiles, m, mask=mask)
    tl.store(tiles + plane, tl.sum(e, 1), mask=mask)
    tl.store(tiles + 2 * plane, tl.sum(e * z, 1), mask=mask)
    if OUT:
        e *= scale
        if CAP:
            part = (z + base[:, None]) / cap
            e *= 1.0 - part * part
        out = out_ptr + row.to(tl.int64)[:, None] * out_stride + column[None, :]
        out_mask = row_mask[:, None] & column_mask[None, :]
        tl.store(out, e.to(out_ptr.dtype.element_ty), mask=out_mask)


@triton.jit
def _epilogue(
    z, row, block, tiles_ptr, target_z_ptr, targets_ptr, bias_ptr, out_ptr, out_stride,
    rows, columns, cap, scale,
    BIAS: tl.constexpr, CAP: tl.constexpr, TOTAL: tl.constexpr, OUT: tl.constexpr, N: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """`_block_statistics` of PARTS (a power of two) parts of a tile's columns."""
    if PARTS == 1:
        _block_statistics(
            z, row, block, tiles_ptr, target_z_ptr, targets_ptr, bias_ptr, out_ptr, out_stride,
            rows, columns, cap, scale, BIAS, CAP, TOTAL, OUT, N,
        )  # fmt: skip
    else:
        left, right = z.reshape(z.shape[0], 2, N // 2).permute(0, 2, 1).split()
        _epilogue(
            left, row, 2 * block, tiles_ptr, target_z_ptr, targets_ptr, bias_ptr, out_ptr,
            out_stride, rows, columns, cap, scale, BIAS, CAP, TOTAL, OUT, N // 2, PARTS // 2,
        )  # fmt: skip
        _epilogue(
            right, row, 2 * block + 1, tiles_ptr, target_z_ptr, targets_ptr, bias_ptr, out_ptr,
            out_stride, rows, columns, cap, scale, BIAS, CAP, TOTAL, OUT, N // 2, PARTS // 2,
        )  # fmt: skip


@triton.jit
def _product_kernel(
    tiles_ptr, target_z_ptr, targets_ptr, bias_ptr, out_ptr, out_stride,
    hidden, hidden_stride, weight, weight_stride, rows, columns, depth, cap, scale,
    TMA: tl.constexpr, SPECIALIZE: tl.constexpr, FLATTEN: tl.constexpr,
    EVEN: tl.constexpr, WIDE: tl.constexpr,
    BIAS: tl.constexpr, CAP: tl.constexpr, TOTAL: tl.constexpr, OUT: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, PARTS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """tiles[:, block] = m, s, t (TOTAL: and Σ z) of each row over a block of columns.

    TMA: ``hidden`` and ``weight`` are descriptors of [M, K] and [N, K] blocks, else pointers. EVEN:
    depth is a multiple of K. OUT: ``out`` = ``scale`` · e^(z−m), times the soft cap's slope.
    PARTS: a block of statistics has N / PARTS columns, and the epilogue needs fewer registers.
    """
    down = tl.cdiv(rows, M)
    across = tl.cdiv(columns, N)
    for tile in tl.range(
        tl.program_id(0),
        down * across,
        tl.num_programs(0),
        flatten=FLATTEN,
        warp_specialize=SPECIALIZE,
    ):
        group = tile // (GROUP * across)
        high = tl.minimum(down - group * GROUP, GROUP)
        within = tile % (GROUP * across)
        first_row = (group * GROUP + within % high) * M
        block = within // high
        row = first_row + tl.arange(0, M)
        column = block * N + tl.arange(0, N)
        z = tl.zeros([M, N], tl.float32)
        if not TMA:
            hidden_line = hidden + row.to(tl.int64)[:, None] * hidden_stride
            weight_line = weight + column.to(tl.int64)[None, :] * weight_stride
        for first in range(0, depth, K):
            if TMA:
                h = hidden.load([first_row, first])
                w = weight.load([block * N, first]).T
            else:
                k = first + tl.arange(0, K)
                h_mask = (row < rows)[:, None]
                w_mask = (column < columns)[None, :]
                if not EVEN:
                    h_mask = h_mask & (k < depth)[None, :]
                    w_mask = w_mask & (k < depth)[:, None]
                h = tl.load(hidden_line + k[None, :], mask=h_mask, other=0.0)
                w = tl.load(weight_line + k[:, None], mask=w_mask, other=0.0)
            if WIDE:
                h = h.to(tl.float32)
                w = w.to(tl.float32)
            z = tl.dot(h, w, z, input_precision="ieee")
        _epilogue(
            z, row, block, tiles_ptr, target_z_ptr, targets_ptr, bias_ptr, out_ptr, out_stride,
            rows, columns, cap, scale, BIAS, CAP, TOTAL, OUT, N, PARTS,
        )  # fmt: skip


@triton.jit
def _gradient_kernel(
    out_ptr, out_stride, rows, columns, factors_ptr, targets_ptr, at_target_ptr, even_ptr,
    SMOOTH: tl.constexpr, N: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """``out`` = ``out`` · its block's factor − at_target · [target] − even, in place."""
    row = tl.program_id(0)
    block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    column = block[:, None] * N + tl.arange(0, N)[None, :]
    mask = column < columns
    factor = tl.load(
        factors_ptr + block.to(tl.int64) * rows + row, mask=block * N < columns, other=0.0
    )
    line = out_ptr + row.to(tl.int64) * out_stride
    grad = tl.load(line + column, mask=mask, other=0.0).to(tl.float32) * factor[:, None]
    target = tl.load(targets_ptr + row)
    grad -= tl.where(column == target, tl.load(at_target_ptr + row), 0.0)
    if SMOOTH:
        grad -= tl.load(even_ptr + row)
    tl.store(line + column, grad.to(out_ptr.dtype.element_ty), mask=mask)


def architecture(device: torch.device) -> str:
    """The key of `tile_size` for a device; "cpu" under the interpreter."""
    if device.type != "cuda":
        return "cpu"
    if torch.version.hip:
        return "amd"
    return str(10 * torch.cuda.get_device_capability(device)[0])


def tile_size(
    architecture: str, element_size: int, *, aligned: bool = True
) -> tuple[dict[str, Any], dict[str, int]]:
    """Constants and launch options of the product: tile and the way its operands come.

    ``architecture``: NVIDIA's 80, 90, 100 or 120, "amd" or "cpu". ``aligned``: rows of the operands
    begin on 16 bytes, as TMA needs it.
    """
    wide, parts, stages = {
        "90": (256, 2, 4),
        "100": (256, 4, 4),
        "amd": (256, 2, 2),  # its shared memory has 64 KiB
    }.get(architecture, (128, 1, 3))
    high = 128
    if element_size > 2:  # tensor cores would round it; its operands take registers too
        high, wide, parts, stages = 64, 128, 1, min(stages, 3)
    tma = aligned and element_size == 2 and architecture in ("90", "100", "120")
    constants = {
        "M": high,
        "N": wide,
        "K": 128 // element_size,
        "PARTS": parts,
        "TMA": tma,
        # Triton 3.8 ignores it on Hopper or fails there, and fails with pointers on Blackwell.
        "SPECIALIZE": tma and architecture == "100",
        # There the next tile's loads begin during the epilogue.
        "FLATTEN": tma and architecture == "90",
    }
    return constants, {"num_warps": 8, "num_stages": stages}


def _programs(device: torch.device) -> int:
    if device.type != "cuda":
        return 3
    return torch.cuda.get_device_properties(device).multi_processor_count


def statistics(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    *,
    bias_v: Tensor | None = None,
    soft_cap: float | None = None,
    total: bool = False,
    infinite: bool = False,
) -> Tensor:
    """[5, N]: m, ln s, the entropy, the target's z and, with ``total``, Σ z of each row."""
    stats_5N = hidden_ND.new_zeros(5, len(hidden_ND), dtype=torch.float32)
    tiles_XTN, _ = _product(hidden_ND, weight_VD, targets_N, stats_5N[3], bias_v, soft_cap, total)
    _merge(tiles_XTN, stats_5N)
    return stats_5N


def row_gradients(
    hidden_nD: Tensor,
    weight_VD: Tensor,
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
    """`torch_logit_tiles.row_gradients` of hidden · weightᵀ, which is not kept; not ``soft_cap``
    and ``smoothing`` together. ``out_nV`` has contiguous rows."""
    out = out_nV, scale
    tiles_XTn, width = _product(
        hidden_nD, weight_VD, targets_n, stats_5n[3], bias_v, soft_cap, smoothing > 0, out
    )
    fade_Tn, s = _merge(tiles_XTn, stats_5n)
    valid_n = (targets_n != ignore_index).float()
    at_target = valid_n * (scale * (1 - smoothing))
    if soft_cap:
        at_target *= 1 - (stats_5n[3] / soft_cap).square()
    (rows, columns), blocks = out_nV.shape, len(fade_Tn)
    high = max(1, _GRADIENT_TILE // width)
    launch(
        _gradient_kernel, (rows, triton.cdiv(blocks, high)),
        out_nV, out_nV.stride(0), rows, columns,
        fade_Tn.mul_(valid_n / s), targets_n, at_target, valid_n * (scale * smoothing / columns),
        SMOOTH=smoothing > 0, N=width, BLOCKS=high, num_warps=_GRADIENT_WARPS,
    )  # fmt: skip
    return out_nV


def _product(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    target_z_N: Tensor,
    bias_v: Tensor | None,
    soft_cap: float | None,
    total: bool,
    out: tuple[Tensor, float] | None = None,
) -> tuple[Tensor, int]:
    """[3 or 4, T, N]: m, s, t and, with ``total``, Σ z over each of T blocks; a block's columns."""
    hidden_ND, weight_VD = (
        x if x.stride(1) == 1 else x.contiguous() for x in (hidden_ND, weight_VD)
    )
    (rows, depth), columns = hidden_ND.shape, len(weight_VD)
    constants, options = tile_size(
        architecture(hidden_ND.device),
        hidden_ND.element_size(),
        aligned=_aligned(hidden_ND) and _aligned(weight_VD),
    )
    high, wide, deep = (constants[name] for name in "MNK")
    width = wide // constants["PARTS"]
    tiles_XTN = torch.empty(
        3 + total, triton.cdiv(columns, width), rows, device=hidden_ND.device, dtype=torch.float32
    )
    operands = hidden_ND, weight_VD
    if constants["TMA"] and rows:
        operands = (
            TensorDescriptor.from_tensor(hidden_ND, [high, deep]),
            TensorDescriptor.from_tensor(weight_VD, [wide, deep]),
        )
    out_NV, scale = out or (None, 1.0)
    tiles = triton.cdiv(rows, high) * triton.cdiv(columns, wide)
    launch(
        _product_kernel, (min(_programs(hidden_ND.device), tiles),),
        tiles_XTN, target_z_N, targets_N, bias_v,
        out_NV, 0 if out_NV is None else out_NV.stride(0),
        operands[0], hidden_ND.stride(0), operands[1], weight_VD.stride(0),
        rows, columns, depth, float(soft_cap or 1.0), scale,
        EVEN=depth % deep == 0, WIDE=_INTERPRETED, BIAS=bias_v is not None,
        CAP=soft_cap is not None, TOTAL=total, OUT=out is not None, GROUP=_GROUP,
        **constants, **options,
    )  # fmt: skip
    return tiles_XTN, width


def _aligned(x: Tensor) -> bool:
    """Whether its rows begin on 16 bytes."""
    return x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0


def _merge(tiles: Tensor, stats_5N: Tensor) -> tuple[Tensor, Tensor]:
    """Statistics of whole rows from those of their tiles [3 or 4, T, N]; e^(tile's m − m), s."""
    m_TN, s_TN, t_TN, *total_TN = tiles
    m = m_TN.amax(0)
    shift_TN = (m_TN - m.masked_fill(m.isneginf(), 0.0)).clamp_(min=_NEVER.value)
    fade_TN = shift_TN.exp()
    s = (fade_TN * s_TN).sum(0)
    t = shift_TN.mul_(s_TN).add_(t_TN).mul_(fade_TN).sum(0)
    stats_5N[0] = m
    torch.log(s, out=stats_5N[1])
    torch.sub(stats_5N[1], t / s, out=stats_5N[2])
    if total_TN:
        torch.sum(total_TN[0], 0, out=stats_5N[4])
    return fade_TN, s
