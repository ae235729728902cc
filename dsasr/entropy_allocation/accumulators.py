"""What the accumulators of this package share: named float64 sums that add up over ranks."""

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

    def state(self) -> dict[str, Tensor]:
        """The sums themselves, by name (not copies): safe to all-reduce in place, or to store."""
        return self.sums

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take over stored sums. Raises ValueError if names or shapes are another accumulator's."""
        shapes = {name: tuple(value.shape) for name, value in state.items()}
        own = {name: tuple(value.shape) for name, value in self.sums.items()}
        if shapes != own:
            raise ValueError(f"state has {shapes}, this accumulator has {own}")
        for name, value in self.sums.items():
            value.copy_(state[name])

    def merge(self, other: Sums) -> None:
        """Add the sums of another accumulator of the same shapes."""
        for name, value in self.sums.items():
            value += other.sums[name].to(value.device)

    def reduce(self, all_reduce: Callable[[Tensor], object]) -> None:
        """Sum over ranks, tensor by tensor: ``all_reduce`` adds in place, or returns the sum."""
        for value in self.sums.values():
            result = all_reduce(value)
            if isinstance(result, Tensor) and result is not value:
                value.copy_(result)

    def reset(self) -> None:
        for value in self.sums.values():
            value.zero_()
