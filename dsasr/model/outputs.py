"""What a model's forward hands to the engine."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Outputs:
    """``loss`` is the mean over this rank's targets, a scalar to call ``backward`` on.

    ``sums`` maps a name to (sum, count), both detached scalars: add them up over ranks and steps,
    then divide. ``features_BSE`` and ``lengths_B`` are the encoder's frames, detached.
    """

    loss: Tensor
    sums: dict[str, tuple[Tensor, Tensor]]
    features_BSE: Tensor | None = None
    lengths_B: Tensor | None = None
