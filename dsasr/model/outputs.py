"""What a model's forward returns to the engine: the loss, and sums for the metrics."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

Number = Tensor | float


@dataclass(frozen=True)
class Outputs:
    """``loss_sum``: the loss summed over the ``targets`` of this rank's micro-batch; both scalars.

    The engine divides by the targets of the whole step, over all ranks and micro-batches: a target
    weighs the same wherever it lies. ``targets`` is what the module's ``count_targets`` says of the
    batch.

    ``sums`` maps a metric to (sum, count), both detached scalars: added up over ranks and steps,
    then divided.
    """

    loss_sum: Tensor
    targets: Tensor
    sums: dict[str, tuple[Tensor, Tensor]]

    @property
    def loss(self) -> Tensor:
        """The mean over this micro-batch's targets; 0 where it has none."""
        return self.loss_sum / self.targets.clamp_min(1).to(self.loss_sum.dtype)


def add_sums(
    sums: dict[str, tuple[Number, Number]], more: Mapping[str, tuple[Number, Number]]
) -> None:
    """Add ``more`` to ``sums`` in place; both map a metric to (sum, count), as `Outputs.sums`."""
    for name, (total, count) in more.items():
        before = sums.get(name, (0.0, 0.0))
        sums[name] = (before[0] + total, before[1] + count)
