"""Streaming float64 sums over frames, added up over batches, workers and ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor


class Sums:
    """Named float64 tensors of fixed shapes, all of them plain sums."""

    def __init__(
        self, shapes: Mapping[str, tuple[int, ...]], device: torch.device | str = "cpu"
    ) -> None:
        self.sums = {
            name: torch.zeros(shape, dtype=torch.float64, device=device)
            for name, shape in shapes.items()
        }

    def reduce(self, all_reduce: Callable[[Tensor], object]) -> None:
        """Sum over ranks, tensor by tensor; ``all_reduce`` adds in place.

        Every rank calls it, also a rank without frames.
        """
        for value in self.sums.values():
            all_reduce(value)
