"""What a model's forward returns to the engine: the loss, and sums for the metrics."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Outputs:
    """``loss`` is the mean over this rank's targets, a scalar to call ``backward`` on.

    ``sums`` maps a metric to (sum, count), both detached scalars: added up over ranks and steps,
    then divided.
    """

    loss: Tensor
    sums: dict[str, tuple[Tensor, Tensor]]
