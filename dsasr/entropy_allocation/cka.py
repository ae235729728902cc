"""Linear CKA: the similarity of two representations of the same frames.

With X [N, d] and Y [N, d'], columns centered (Kornblith et al. 2019, arXiv 1905.00414, the feature
form):

    CKA(X, Y) = ‖YᵀX‖²_F / (‖XᵀX‖_F · ‖YᵀY‖_F)   ∈ [0, 1], no unit

1 under rotation and isotropic scaling of either side. It equals the Gram form at O(N·d²) instead of
O(N²·d). Everything it needs is a sum over frames, kept in float64, so that batches, workers and
ranks add up to the value of one process. Neither estimator below changes with an offset of the
columns, but sums of raw fourth powers would lose m⁴·1e-16 where the means are m times the spread:
an offset, the mean of the first frames, is subtracted before summing. Ranks add up after their sums
are moved to one offset (`CkaSums.reduce`).

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
# A variance below this share of the power is float32's rounding of a constant.
_CONSTANT = float(torch.finfo(torch.float32).eps) ** 2


class CkaSums(Sums):
    """Streaming sums for the CKA between X [N, d] and Y [N, d_y] (``d_y`` defaults to ``d``).

    They are of frames less ``offset_x`` [d] and ``offset_y`` [d_y], the means of the first frames.
    """

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
        self.offset_x = torch.zeros(d, dtype=torch.float64, device=device)
        self.offset_y = torch.zeros(d_y, dtype=torch.float64, device=device)

    @torch.no_grad()
    def update(self, x_ND: Tensor, y_ND: Tensor) -> None:
        """Add frames; row i of both sides is the same frame. Raises ValueError on other shapes."""
        if x_ND.ndim != 2 or x_ND.shape[1] != self.d or y_ND.shape != (len(x_ND), self.d_y):
            raise ValueError(
                f"expected [N, {self.d}] and [N, {self.d_y}], "
                f"got {list(x_ND.shape)} and {list(y_ND.shape)}"
            )
        sums, device = self.sums, self.sums["n"].device
        if not self.frames and len(x_ND):
            self.offset_x = x_ND[:_CHUNK].to(device, torch.float64).mean(0)
            self.offset_y = y_ND[:_CHUNK].to(device, torch.float64).mean(0)
        for start in range(0, len(x_ND), _CHUNK):
            x = x_ND[start : start + _CHUNK].to(device, torch.float64) - self.offset_x
            y = y_ND[start : start + _CHUNK].to(device, torch.float64) - self.offset_y
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

    def reduce(self, all_reduce: Callable[[Tensor], object]) -> None:
        """`Sums.reduce`, after all ranks moved to one offset: the mean of theirs, by frames."""
        n = self.sums["n"].clone()
        offsets = [(n * offset).nan_to_num() for offset in (self.offset_x, self.offset_y)]
        for value in (n, *offsets):
            all_reduce(value)
        self._move(*(offset / n.clamp(min=1) for offset in offsets))
        super().reduce(all_reduce)

    def _move(self, offset_x: Tensor, offset_y: Tensor) -> None:
        """Make the sums those of frames less other offsets."""
        s, u, v = self.sums, offset_x - self.offset_x, offset_y - self.offset_y
        n, uu, vv = s["n"].clone(), u @ u, v @ v
        sum_a, sum_b = s["xx"].trace(), s["yy"].trace()  # Σa, Σb
        xx_u, yy_v, yx_u, xy_v = s["xx"] @ u, s["yy"] @ v, s["xy"].T @ u, s["xy"] @ v
        # x' = x − u, so a' = a − 2u·x + u·u; likewise y', b'.
        aa = s["aa"] - 4 * (u @ s["ax"]) + 4 * (u @ xx_u) + uu * (2 * sum_a - 4 * (u @ s["x"]))
        bb = s["bb"] - 4 * (v @ s["by"]) + 4 * (v @ yy_v) + vv * (2 * sum_b - 4 * (v @ s["y"]))
        ab = s["ab"] - 2 * (v @ s["ay"]) - 2 * (u @ s["bx"]) + 4 * (u @ xy_v)
        ab = ab + vv * (sum_a - 2 * (u @ s["x"])) + uu * (sum_b - 2 * (v @ s["y"]))
        total_a = sum_a - 2 * (u @ s["x"]) + n * uu  # Σa'
        total_b = sum_b - 2 * (v @ s["y"]) + n * vv
        moved = {
            "x": s["x"] - n * u,
            "y": s["y"] - n * v,
            "xx": s["xx"] - torch.outer(s["x"], u) - torch.outer(u, s["x"]) + n * torch.outer(u, u),
            "yy": s["yy"] - torch.outer(s["y"], v) - torch.outer(v, s["y"]) + n * torch.outer(v, v),
            "xy": s["xy"] - torch.outer(s["x"], v) - torch.outer(u, s["y"]) + n * torch.outer(u, v),
            "aa": aa + n * uu * uu,
            "bb": bb + n * vv * vv,
            "ab": ab + n * uu * vv,
            "ax": s["ax"] - 2 * xx_u + uu * s["x"] - u * total_a,
            "ay": s["ay"] - 2 * yx_u + uu * s["y"] - v * total_a,
            "bx": s["bx"] - 2 * xy_v + vv * s["x"] - u * total_b,
            "by": s["by"] - 2 * yy_v + vv * s["y"] - v * total_b,
        }
        for name, value in moved.items():
            s[name].copy_(value)
        self.offset_x, self.offset_y = offset_x, offset_y

    def _constant_side(self) -> bool:
        """Whether all frames of a side are alike up to float32's rounding."""
        s, n = self.sums, self.sums["n"].clamp(min=1)
        for name, offset in (("x", self.offset_x), ("y", self.offset_y)):
            mean = s[name] / n
            spread = s[2 * name].trace() - n * (mean @ mean)
            power = spread + n * (mean + offset).square().sum()
            if float(spread) <= _CONSTANT * float(power):
                return True
        return False

    @property
    def frames(self) -> int:
        return int(self.sums["n"])

    def value(self, *, unbiased: bool = False) -> float:
        """The CKA; NaN if a side is constant, a frame is not finite, or N < 2 (unbiased: < 4)."""
        if self._constant_side():
            return math.nan
        return self._unbiased() if unbiased else self._plain()

    def _plain(self) -> float:
        s = self.sums
        n = s["n"].clamp(min=1)
        xx = s["xx"] - torch.outer(s["x"], s["x"]) / n
        yy = s["yy"] - torch.outer(s["y"], s["y"]) / n
        xy = s["xy"] - torch.outer(s["x"], s["y"]) / n
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
