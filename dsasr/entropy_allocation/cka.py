"""Linear CKA: the similarity of two representations of the same frames.

With X [N, d] and Y [N, d'], columns centered (Kornblith et al. 2019, arXiv 1905.00414, the feature
form):

    CKA(X, Y) = ‖YᵀX‖²_F / (‖XᵀX‖_F · ‖YᵀY‖_F)   ∈ [0, 1], no unit

1 under rotation and isotropic scaling of either side. It equals the Gram form at O(N·d²) instead of
O(N²·d). Everything it needs is a sum over frames, kept in float64, so that batches, workers and
ranks add up to the value of one process. The sums are centered only at the end: with column means m
times their standard deviation, the value loses about m²·1e-16.

``unbiased=True`` takes for each HSIC the estimator of Song et al. 2012 (JMLR 13, 1393; used for CKA
by Nguyen et al. 2021, arXiv 2010.15327):

    HSIC₁(K, L) = [tr(K̃L̃) + 1ᵀK̃1·1ᵀL̃1 / ((N−1)(N−2)) − 2·1ᵀK̃L̃1 / (N−2)] / (N(N−3)),

K = XXᵀ and L = YYᵀ with zeroed diagonals. Writing it by sums over frames, with no N×N matrix, is
**ours**. Use it when N is not much larger than d, where the plain form leans toward 1. It may leave
[0, 1].

Memory: (d² + d'² + d·d') float64, 25 MB at d = d' = 1024. Cost: N·(d² + d'² + d·d') multiply-adds
in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dsasr.entropy_allocation.accumulators import Sums

_CHUNK = 16384  # frames converted at a time: bounds the float64 copy


class CkaSums(Sums):
    """Streaming sums for the CKA between X [N, d] and Y [N, d_y] (``d_y`` defaults to ``d``)."""

    def __init__(
        self,
        d: int,
        d_y: int | None = None,
        *,
        device: torch.device | str = "cpu",
    ) -> None:
        d_y = d if d_y is None else d_y
        self.d, self.d_y = d, d_y
        shapes: dict[str, tuple[int, ...]] = {"n": (), "x": (d,), "y": (d_y,)}
        shapes |= {"xx": (d, d), "yy": (d_y, d_y), "xy": (d, d_y)}
        # With a = ‖x‖² and b = ‖y‖² of a frame: Σa², Σab, Σb², Σax, Σbx, Σay, Σby.
        shapes |= {"aa": (), "ab": (), "bb": ()}
        shapes |= {"ax": (d,), "bx": (d,), "ay": (d_y,), "by": (d_y,)}
        super().__init__(shapes, device)

    @torch.no_grad()
    def update(self, x_ND: Tensor, y_ND: Tensor) -> None:
        """Add frames; row i of both sides is the same frame. Raises ValueError on other shapes."""
        if x_ND.ndim != 2 or x_ND.shape[1] != self.d or y_ND.shape != (len(x_ND), self.d_y):
            raise ValueError(
                f"expected [N, {self.d}] and [N, {self.d_y}], "
                f"got {list(x_ND.shape)} and {list(y_ND.shape)}"
            )
        sums, device = self.sums, self.sums["n"].device
        for start in range(0, len(x_ND), _CHUNK):
            x = x_ND[start : start + _CHUNK].to(device, torch.float64)
            y = y_ND[start : start + _CHUNK].to(device, torch.float64)
            a, b = (x * x).sum(1), (y * y).sum(1)
            sums["n"] += len(x)
            sums["x"] += x.sum(0)
            sums["y"] += y.sum(0)
            for name, left, right in (("xx", x, x), ("yy", y, y), ("xy", x, y)):
                sums[name] += left.T @ right
            for name, left, right in (("aa", a, a), ("ab", a, b), ("bb", b, b)):
                sums[name] += left @ right
            for name, left, right in (("ax", a, x), ("bx", b, x), ("ay", a, y), ("by", b, y)):
                sums[name] += left @ right

    @property
    def frames(self) -> int:
        return int(self.sums["n"])

    def value(self, *, unbiased: bool = False) -> float:
        """The CKA; NaN if a side is constant, a frame is not finite, or N < 2 (unbiased: < 4)."""
        return self._unbiased() if unbiased else self._plain()

    def _plain(self) -> float:
        s = self.sums
        n = s["n"].clamp(min=1)
        xx = s["xx"] - torch.outer(s["x"], s["x"]) / n
        yy = s["yy"] - torch.outer(s["y"], s["y"]) / n
        xy = s["xy"] - torch.outer(s["x"], s["y"]) / n
        # A variance below the rounding error of the raw sums is that of a constant.
        for centered, raw in ((xx, s["xx"]), (yy, s["yy"])):
            if float(centered.trace()) <= 1e-12 * float(raw.trace()):
                return math.nan
        denominator = float(xx.norm() * yy.norm())
        return min(1.0, float((xy * xy).sum()) / denominator) if denominator > 0 else math.nan

    def _unbiased(self) -> float:
        s = self.sums
        n = float(s["n"])
        if n < 4:
            return math.nan
        x, y, xx, yy, xy = s["x"], s["y"], s["xx"], s["yy"], s["xy"]
        sum_k = x @ x - xx.trace()
        sum_l = y @ y - yy.trace()
        kl = x @ xy @ y - x @ s["bx"] - y @ s["ay"] + s["ab"]
        kk = x @ xx @ x - 2 * (x @ s["ax"]) + s["aa"]
        ll = y @ yy @ y - 2 * (y @ s["by"]) + s["bb"]

        def hsic(trace: Tensor, sums: Tensor, cross: Tensor) -> float:
            return float(trace + sums / ((n - 1) * (n - 2)) - 2 * cross / (n - 2))

        numerator = hsic((xy * xy).sum() - s["ab"], sum_k * sum_l, kl)
        variance = hsic((xx * xx).sum() - s["aa"], sum_k * sum_k, kk)
        variance *= hsic((yy * yy).sum() - s["bb"], sum_l * sum_l, ll)
        return numerator / math.sqrt(variance) if variance > 0 else math.nan


class LayerCka:
    """One `CkaSums` per layer: each layer against the same layer of a reference encoder."""

    def __init__(self, widths: Sequence[int], *, device: torch.device | str = "cpu") -> None:
        self.layers = [CkaSums(width, device=device) for width in widths]

    def update(self, x: Sequence[Tensor], y: Sequence[Tensor]) -> None:
        """Add frames: for each layer a pair of [N, width]."""
        for sums, x_ND, y_ND in zip(self.layers, x, y, strict=True):
            sums.update(x_ND, y_ND)

    def reduce(self, all_reduce: Callable[[Tensor], object]) -> None:
        for sums in self.layers:
            sums.reduce(all_reduce)

    def values(self, *, unbiased: bool = False) -> list[float]:
        return [sums.value(unbiased=unbiased) for sums in self.layers]


def cka(x_ND: Tensor, y_ND: Tensor, *, unbiased: bool = False) -> float:
    """CKA of two representations [N, d] and [N, d'] of the same N frames."""
    sums = CkaSums(x_ND.shape[1], y_ND.shape[1], device=x_ND.device)
    sums.update(x_ND, y_ND)
    return sums.value(unbiased=unbiased)
