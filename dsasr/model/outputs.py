"""What a model's forward returns to the engine: the loss, and sums for the metrics."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


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
