"""LM head and cross-entropy in one op, over tiles of the [N, V] logits that never exist at once.

Forward: for each block of columns, W·h by the library's matrix product, then one pass over the tile
that updates each row's online softmax. Backward: the same tiles again, one pass that turns logits
into their gradient, and two products. That is four products where gradients computed in the forward
pass would need three; in return every upstream gradient is exact, per token and through the
entropy, and a block of the weight's gradient is complete when its columns are done: it is summed
in float32 and rounded once, however long N is. Only hidden's gradient is summed over the blocks, in
N·D float32 instead of V·D.

The weight itself is saved for the backward pass, no copy and no view of it: a weight that ZeRO-3
partitions may be released in between and gathered again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dsasr.kernels import torch_logit_tiles

# Logits in a tile. CPU: two tiles of float32 stay in cache. GPU: matrix products fill the device,
# and adding hidden's gradient (N · D) to its sum moves little memory beside a block's tile (by
# arithmetic, not measured).
_CPU_TILE = (1024, 512)
_GPU_TILE_LOGITS = 1 << 26
_GPU_ROWS = 1 << 16
_GPU_MIN_COLUMNS = 4096
# Up to this size whole log-probabilities are cheaper, on a CPU, than tiles computed twice.
_SMALL_LOGITS = 1 << 21


@dataclass(frozen=True)
class _Plan:
    """The size of a tile of the [N, V] logits, and the options of the loss."""

    rows: int
    columns: int
    ignore_index: int
    soft_cap: float | None
    smoothing: float

    def column_blocks(self, weight_VD: Tensor) -> Iterator[slice]:
        return _slices(weight_VD.shape[0], self.columns)

    def row_blocks(self, hidden_ND: Tensor) -> Iterator[slice]:
        return _slices(hidden_ND.shape[0], self.rows)


def _slices(length: int, step: int) -> Iterator[slice]:
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))


def _on_cpu(x: Tensor) -> bool:
    return x.device.type == "cpu"


def _tile_size(rows: int, columns: int, device: torch.device) -> tuple[int, int]:
    """Rows and columns of a tile of [rows, columns] logits."""
    if device.type == "cpu":
        return _CPU_TILE
    tile_rows = max(1, min(rows, _GPU_ROWS))
    blocks = -(-columns // max(_GPU_TILE_LOGITS // tile_rows, _GPU_MIN_COLUMNS))
    even = -(-columns // blocks)
    return tile_rows, -(-even // 256) * 256


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
) -> Tensor | tuple[Tensor, ...]:
    """`dispatch.linear_cross_entropy` with the tile functions of the module ``tile_ops``."""
    if (
        tile_ops is torch_logit_tiles
        and bias_V is None
        and not soft_cap
        and not label_smoothing
        and _on_cpu(hidden_ND)
        and len(targets_N) * len(weight_VD) <= _SMALL_LOGITS
    ):
        results = _SmallLinearCrossEntropy.apply(ignore_index, hidden_ND, weight_VD, targets_N)
    else:
        rows, columns = _tile_size(hidden_ND.shape[0], weight_VD.shape[0], hidden_ND.device)
        plan = _Plan(rows, columns, ignore_index, soft_cap or None, label_smoothing)
        tensors = hidden_ND, weight_VD, bias_V, targets_N.contiguous()
        results = _LinearCrossEntropy.apply(tile_ops, plan, *tensors)
    # The entropy and the hits come with the online softmax at no cost worth skipping.
    nll_N, entropy_N, correct_N = results
    extra = (entropy_N,) * return_entropy + (correct_N,) * return_accuracy
    return (nll_N, *extra) if extra else nll_N


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tile_ops, plan, hidden_ND, weight_VD, bias_V, targets_N):
        ctx.set_materialize_grads(False)
        tiles = _Tiles(tile_ops, plan, hidden_ND, weight_VD, bias_V, targets_N)
        m, s, t, target, total = tiles.statistics()
        log_s = s.log()
        entropy_N = log_s - t / s
        smoothing = plan.smoothing
        nll_N = log_s + (m - target)
        if smoothing:
            nll_N = log_s + (1 - smoothing) * (m - target)
            nll_N += smoothing * (m - total / weight_VD.shape[0])
        ignored_N = targets_N == plan.ignore_index
        nll_N.masked_fill_(ignored_N, 0.0)
        masked_entropy_N = entropy_N.masked_fill(ignored_N, 0.0)
        correct_N = (target == m) & ~ignored_N
        ctx.save_for_backward(
            hidden_ND, weight_VD, bias_V, targets_N, torch.stack([m, log_s, entropy_N])
        )
        ctx.tile_ops, ctx.plan = tile_ops, plan
        ctx.mark_non_differentiable(correct_N)
        return nll_N, masked_entropy_N, correct_N

    @staticmethod
    @once_differentiable
    def backward(ctx, nll_grad_N, entropy_grad_N, _):
        hidden_ND, weight_VD, bias_V, targets_N, saved_3N = ctx.saved_tensors
        if nll_grad_N is None and entropy_grad_N is None:
            return (None,) * 6
        tiles = _Tiles(ctx.tile_ops, ctx.plan, hidden_ND, weight_VD, bias_V, targets_N)
        needed = ctx.needs_input_grad[2:5]
        grads = tiles.gradients(saved_3N, nll_grad_N, entropy_grad_N, needed)
        return None, None, *grads, None


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
    @once_differentiable
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


class _Tiles:
    """The tiles of one call: its inputs, its buffers, and the loops over them."""

    def __init__(self, tile_ops, plan: _Plan, hidden_ND, weight_VD, bias_V, targets_N):
        self.tile_ops, self.plan = tile_ops, plan
        self.weight_VD, self.bias_V, self.targets_N = weight_VD, bias_V, targets_N
        self.sum_dtype = torch.promote_types(hidden_ND.dtype, torch.float32)
        # CPUs multiply low precision slowly and cannot add it up in float32.
        self.on_cpu = _on_cpu(hidden_ND)
        self.factor_dtype = self.sum_dtype if self.on_cpu else hidden_ND.dtype
        self.hidden_ND = hidden_ND.to(self.factor_dtype)

    def _buffer(self, dtype: torch.dtype) -> Tensor:
        rows = min(self.plan.rows, len(self.hidden_ND))
        columns = min(self.plan.columns, len(self.weight_VD))
        return self.hidden_ND.new_empty(rows * self._pitch(columns), dtype=dtype)

    def _pitch(self, columns: int) -> int:
        """Elements from row to row: on a GPU rows begin on 16 bytes, for the matrix units."""
        return columns if self.on_cpu else -(-columns // 8) * 8

    def _view(self, buffer: Tensor, rows: slice, columns: slice) -> Tensor:
        n, v = rows.stop - rows.start, columns.stop - columns.start
        return buffer.as_strided((n, v), (self._pitch(v), 1))

    def _weight(self, columns: slice) -> Tensor:
        return self.weight_VD[columns].to(self.factor_dtype)

    def _options(self, columns: slice) -> dict:
        bias_v = None
        if self.bias_V is not None:
            bias_v = self.bias_V[columns].to(self.sum_dtype).contiguous()
        return {
            "start": columns.start,
            "bias_v": bias_v,
            "soft_cap": self.plan.soft_cap,
            "infinite": bias_v is not None,  # nothing else makes a logit −inf
        }

    def statistics(self) -> Tensor:
        """[5, N]: each row's online softmax over all columns (`torch_logit_tiles`)."""
        carry_5N = self.hidden_ND.new_zeros(5, len(self.hidden_ND), dtype=self.sum_dtype)
        carry_5N[0] = -torch.inf
        buffer = self._buffer(self.sum_dtype)
        scratch = self._buffer(self.sum_dtype) if self.tile_ops is torch_logit_tiles else None
        for columns in self.plan.column_blocks(self.weight_VD):
            weight_vD, options = self._weight(columns), self._options(columns)
            for rows in self.plan.row_blocks(self.hidden_ND):
                z_nv = self._view(buffer, rows, columns)
                _product(self.hidden_ND[rows], weight_vD.T, z_nv)
                self.tile_ops.update(
                    z_nv,
                    carry_5N[:, rows],
                    self.targets_N[rows],
                    total=self.plan.smoothing > 0,
                    scratch_nv=None if scratch is None else self._view(scratch, rows, columns),
                    **options,
                )
        return carry_5N

    def gradients(
        self,
        saved_3N: Tensor,
        nll_grad_N: Tensor | None,
        entropy_grad_N: Tensor | None,
        needed: tuple[bool, ...],
    ) -> tuple[Tensor | None, ...]:
        """Gradients of hidden, weight and bias; None for those not ``needed``."""
        rows_6N, scale = self._row_factors(saved_3N, nll_grad_N, entropy_grad_N)
        sums = _GradientSums(self, needed, scale)
        buffer, out = self._buffer(self.sum_dtype), self._buffer(self.factor_dtype)
        for columns in self.plan.column_blocks(self.weight_VD):
            weight_vD, options = self._weight(columns), self._options(columns)
            for rows in self.plan.row_blocks(self.hidden_ND):
                z_nv = self._view(buffer, rows, columns)
                _product(self.hidden_ND[rows], weight_vD.T, z_nv)
                dz_nv = self.tile_ops.gradient(
                    z_nv,
                    rows_6N[:, rows],
                    self.targets_N[rows],
                    entropy=entropy_grad_N is not None,
                    smooth=self.plan.smoothing > 0,
                    out_nv=self._view(out, rows, columns),
                    **options,
                )
                sums.add(dz_nv, weight_vD, rows, columns)
        return sums.finish()

    def _row_factors(
        self, saved_3N: Tensor, nll_grad_N: Tensor | None, entropy_grad_N: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The six factors per row that a gradient tile needs, and the scale that they are given.

        float16 has nothing below 6e-8, and p / N is far below: there the factors are scaled so that
        the largest becomes 1024, and the sums are divided again in float32.
        """
        m, log_s, entropy_N = saved_3N
        ignored_N = self.targets_N == self.plan.ignore_index
        zero_N = torch.zeros_like(m)
        nll, entropy = (
            zero_N if grad is None else grad.to(m.dtype).masked_fill(ignored_N, 0.0)
            for grad in (nll_grad_N, entropy_grad_N)
        )
        scale = None
        if self.factor_dtype == torch.float16 and len(nll):
            largest = torch.maximum(nll.abs().max(), entropy.abs().max())
            scale = torch.where(largest > 0, 1024 / largest, 1.0)
            nll, entropy = nll * scale, entropy * scale
        smoothing = self.plan.smoothing
        factors = [nll - entropy * entropy_N, -entropy, nll * (1 - smoothing)]
        smooth = nll * (smoothing / len(self.weight_VD))
        return torch.stack([m, log_s, *factors, smooth]), scale


class _GradientSums:
    """Accumulates the products of the gradient tiles, which come one block of columns at a time."""

    def __init__(self, tiles: _Tiles, needed: tuple[bool, ...], scale: Tensor | None):
        self.tiles, self.scale = tiles, scale
        like, bias = {"dtype": tiles.sum_dtype}, tiles.bias_V
        hidden, weight = tiles.hidden_ND, tiles.weight_VD
        self.hidden_ND = torch.zeros_like(hidden, **like) if needed[0] else None
        self.weight_VD = torch.empty_like(weight) if needed[1] else None
        self.bias_V = torch.zeros_like(bias, **like) if needed[2] else None
        one_block = tiles.plan.rows >= len(hidden)
        # Products go straight into the result where no partial sum is rounded.
        self.direct = scale is None and (
            weight.dtype == tiles.sum_dtype or (one_block and weight.dtype == tiles.factor_dtype)
        )
        if self.weight_VD is not None and not len(hidden):
            self.weight_VD.zero_()
        if self.weight_VD is not None and not self.direct:
            shape = min(tiles.plan.columns, len(weight)), weight.shape[1]
            self.block = weight.new_empty(shape, **like)

    def add(self, dz_nv: Tensor, weight_vD: Tensor, rows: slice, columns: slice) -> None:
        if self.hidden_ND is not None:
            _product(dz_nv, weight_vD, self.hidden_ND[rows], add=True)
        if self.weight_VD is not None:
            out = self.weight_VD[columns]
            block = out if self.direct else self.block[: len(out)]
            _product(dz_nv.T, self.tiles.hidden_ND[rows], block, add=rows.start > 0)
            if not self.direct and rows.stop == len(self.tiles.hidden_ND):
                out.copy_(block if self.scale is None else block.div_(self.scale))
        if self.bias_V is not None:
            self.bias_V[columns] += dz_nv.sum(0, dtype=self.bias_V.dtype)

    def finish(self) -> tuple[Tensor | None, ...]:
        hidden, bias, scale = self.hidden_ND, self.bias_V, self.scale
        if scale is not None:
            hidden, bias = (g if g is None else g.div_(scale) for g in (hidden, bias))
        return hidden, self.weight_VD, bias


def _product(a: Tensor, b: Tensor, out: Tensor, add: bool = False) -> None:
    """``out`` = a · b, or ``out`` += a · b. Factors of low precision may have a float32 ``out``."""
    mixed = () if a.dtype == out.dtype else (out.dtype,)
    if add:
        torch.addmm(out, a, b, *mixed, out=out)
    else:
        torch.mm(a, b, *mixed, out=out)
