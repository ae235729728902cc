"""The products of an LM head over parts of its [N, V] logits.

`Tiles.statistics` and `Tiles.gradients` go over tiles of a few columns: once for the statistics,
and again when the upstream gradient is known. `Tiles.row_chunks` goes over some rows and all
columns, once, and has the gradients of the summed loss when it is done.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dsasr.kernels import torch_logit_tiles


@dataclass(frozen=True)
class Plan:
    """The size of a tile of the [N, V] logits, and the options of the loss."""

    rows: int
    columns: int
    ignore_index: int
    soft_cap: float | None
    smoothing: float
    # statistics and chunks by `triton_head_statistics`, whose product keeps no logits
    persistent: bool = False
    # rows of a chunk whose gradients are computed in the forward pass; 0: none are
    chunk_rows: int = 0

    def column_blocks(self, weight_VD: Tensor) -> Iterator[slice]:
        return slices(weight_VD.shape[0], self.columns)

    def row_blocks(self, hidden_ND: Tensor) -> Iterator[slice]:
        return slices(hidden_ND.shape[0], self.rows)


def slices(length: int, step: int) -> Iterator[slice]:
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))


def on_cpu(x: Tensor) -> bool:
    return x.device.type == "cpu"


class Tiles:
    """The tiles of one call: its inputs, its buffers, and the loops over them."""

    def __init__(self, tile_ops, plan: Plan, hidden_ND, weight_VD, bias_V, targets_N):
        self.tile_ops, self.plan = tile_ops, plan
        self.weight_VD, self.bias_V, self.targets_N = weight_VD, bias_V, targets_N
        self.sum_dtype = torch.promote_types(hidden_ND.dtype, torch.float32)
        # CPUs multiply low precision slowly and cannot add it up in float32.
        self.on_cpu = on_cpu(hidden_ND)
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

    def _whole_row_options(self) -> dict:
        options = self._options(slice(0, len(self.weight_VD)))
        del options["start"]
        return options

    def statistics(self) -> Tensor:
        """[5, N]: m, ln s, the entropy, the target's z and Σ z of each row."""
        if self.plan.persistent:
            from dsasr.kernels import triton_head_statistics

            columns = slice(0, len(self.weight_VD))
            return triton_head_statistics.statistics(
                self.hidden_ND,
                self._weight(columns),
                self.targets_N,
                total=self.plan.smoothing > 0,
                **self._whole_row_options(),
            )
        carry_5N = self.hidden_ND.new_zeros(5, len(self.hidden_ND), dtype=self.sum_dtype)
        carry_5N[0] = -torch.inf
        buffer = self._buffer(self.sum_dtype)
        scratch = self._buffer(self.sum_dtype) if self.tile_ops is torch_logit_tiles else None
        for columns in self.plan.column_blocks(self.weight_VD):
            weight_vD, options = self._weight(columns), self._options(columns)
            for rows in self.plan.row_blocks(self.hidden_ND):
                z_nv = self._view(buffer, rows, columns)
                product(self.hidden_ND[rows], weight_vD.T, z_nv)
                self.tile_ops.update(
                    z_nv,
                    carry_5N[:, rows],
                    self.targets_N[rows],
                    total=self.plan.smoothing > 0,
                    scratch_nv=None if scratch is None else self._view(scratch, rows, columns),
                    **options,
                )
        _, s, t = carry_5N[:3]
        log_s = s.log()
        carry_5N[2] = log_s - t / s
        carry_5N[1] = log_s
        return carry_5N

    def row_chunks(self, needed: tuple[bool, ...]) -> tuple[Tensor, SumGradients]:
        """[5, N] statistics (`torch_logit_tiles.row_gradients`), and the gradients of the summed
        loss, in three products: each chunk's logits become their gradient where they are.

        Hidden's gradient is final when its chunk is done; the weight's is summed over the chunks,
        in float32, for the factor that it lacks comes with the backward pass.
        """
        hidden, weight, plan = self.hidden_ND, self.weight_VD, self.plan
        chunk = min(plan.chunk_rows, len(hidden))
        buffer_dtype = self.factor_dtype if self._without_logits else self.sum_dtype
        buffer = hidden.new_empty(chunk * self._pitch(len(weight)), dtype=buffer_dtype)
        # In float16 a small p is 0: there it is kept 1024 times as large.
        scale = 1024.0 if self.factor_dtype == torch.float16 else 1.0
        stats_5N = hidden.new_zeros(5, len(hidden), dtype=self.sum_dtype)
        like = {"dtype": self.sum_dtype}
        sums = SumGradients(
            torch.empty_like(hidden, **like) if needed[0] else None,
            torch.empty_like(weight, **like) if needed[1] else None,
            torch.zeros_like(self.bias_V, **like) if needed[2] else None,
            scale,
        )
        options = {
            "ignore_index": plan.ignore_index,
            "smoothing": plan.smoothing,
            "scale": scale,
            **self._whole_row_options(),
        }
        for rows in slices(len(hidden), chunk):
            dz_nV = self._chunk_gradient(buffer, rows, stats_5N[:, rows], options)
            if sums.hidden_ND is not None:
                product(dz_nV, weight, sums.hidden_ND[rows])
            if sums.weight_VD is not None:
                product(dz_nV.T, hidden[rows], sums.weight_VD, add=rows.start > 0)
            if sums.bias_V is not None:
                sums.bias_V += dz_nV.sum(0, dtype=self.sum_dtype)
        return stats_5N, sums

    def _chunk_gradient(
        self, buffer: Tensor, rows: slice, stats_5n: Tensor, options: dict
    ) -> Tensor:
        """A chunk's gradients of the logits in ``buffer``, and its statistics in ``stats_5n``."""
        hidden_nD, targets_n = self.hidden_ND[rows], self.targets_N[rows]
        out_nV = self._view(buffer, rows, slice(0, len(self.weight_VD)))
        if self._without_logits:
            from dsasr.kernels import triton_head_statistics

            return triton_head_statistics.row_gradients(
                hidden_nD, self.weight_VD, stats_5n, targets_n, out_nV=out_nV, **options
            )
        product(hidden_nD, self.weight_VD.T, out_nV)
        in_place = self._in_place(buffer, out_nV)
        return self.tile_ops.row_gradients(out_nV, stats_5n, targets_n, out_nV=in_place, **options)

    @property
    def _without_logits(self) -> bool:
        """Whether chunks keep exponentials alone, which do not tell ε/V of a soft cap's slope."""
        plan = self.plan
        return plan.persistent and not (plan.soft_cap and plan.smoothing)

    def _in_place(self, buffer: Tensor, z_nV: Tensor) -> Tensor:
        """A chunk's gradients in the memory of its logits: each row begins where its logits do."""
        buffer = buffer.view(self.factor_dtype)
        step = z_nV.element_size() // buffer.element_size()
        return buffer.as_strided(z_nV.shape, (z_nV.stride(0) * step, 1))

    def gradients(
        self,
        saved_3N: Tensor,
        nll_grad_N: Tensor | None,
        entropy_grad_N: Tensor | None,
        needed: tuple[bool, ...],
    ) -> tuple[Tensor | None, ...]:
        """Gradients of hidden, weight and bias; None for those not ``needed``."""
        rows_6N, scale = self._row_factors(saved_3N, nll_grad_N, entropy_grad_N)
        sums = GradientSums(self, needed, scale)
        buffer, out = self._buffer(self.sum_dtype), self._buffer(self.factor_dtype)
        for columns in self.plan.column_blocks(self.weight_VD):
            weight_vD, options = self._weight(columns), self._options(columns)
            for rows in self.plan.row_blocks(self.hidden_ND):
                z_nv = self._view(buffer, rows, columns)
                product(self.hidden_ND[rows], weight_vD.T, z_nv)
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


@dataclass
class SumGradients:
    """Gradients of ``scale`` · Σ nll, in float32 at least; None for those that are not needed."""

    hidden_ND: Tensor | None
    weight_VD: Tensor | None
    bias_V: Tensor | None
    scale: float

    def times(self, factor: Tensor, dtype: torch.dtype) -> tuple[Tensor | None, ...]:
        """The gradients of ``factor`` · Σ nll, the weight's in ``dtype``; uses these tensors up."""
        factor = factor.double() / self.scale
        hidden, bias = (g if g is None else g.mul_(factor) for g in (self.hidden_ND, self.bias_V))
        weight = self.weight_VD
        if weight is not None and weight.dtype == dtype:
            weight.mul_(factor)
        elif weight is not None:
            weight = torch.mul(weight, factor, out=weight.new_empty(weight.shape, dtype=dtype))
        return hidden, weight, bias


class GradientSums:
    """Accumulates the products of the gradient tiles, which come one block of columns at a time."""

    def __init__(self, tiles: Tiles, needed: tuple[bool, ...], scale: Tensor | None):
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
            product(dz_nv, weight_vD, self.hidden_ND[rows], add=True)
        if self.weight_VD is not None:
            out = self.weight_VD[columns]
            block = out if self.direct else self.block[: len(out)]
            product(dz_nv.T, self.tiles.hidden_ND[rows], block, add=rows.start > 0)
            if not self.direct and rows.stop == len(self.tiles.hidden_ND):
                out.copy_(block if self.scale is None else block.div_(self.scale))
        if self.bias_V is not None:
            self.bias_V[columns] += dz_nv.sum(0, dtype=self.bias_V.dtype)

    def finish(self) -> tuple[Tensor | None, ...]:
        hidden, bias, scale = self.hidden_ND, self.bias_V, self.scale
        if scale is not None:
            hidden, bias = (g if g is None else g.div_(scale) for g in (hidden, bias))
        return hidden, self.weight_VD, bias


def product(a: Tensor, b: Tensor, out: Tensor, add: bool = False) -> None:
    """``out`` = a · b, or ``out`` += a · b. Factors of low precision may have a float32 ``out``."""
    mixed = () if a.dtype == out.dtype else (out.dtype,)
    if add:
        torch.addmm(out, a, b, *mixed, out=out)
    else:
        torch.mm(a, b, *mixed, out=out)
