"""Who resolves which part of the transcript's uncertainty: tensors in, scalars out.

Every accumulator has ``update``, ``merge``, ``state``, ``load`` and ``reduce``. States are float64
tensors of plain sums, so that `reduce`, given a callable which all-reduces a tensor in place
(``torch.distributed.all_reduce`` does), makes each rank's value that of all ranks. All ranks then
call it the same number of times, also a rank without frames.
"""

from __future__ import annotations

import torch
from torch import Tensor


def valid_frames(x_BSE: Tensor, lengths_B: Tensor) -> Tensor:
    """The frames of a padded batch that are not padding, in order: [N, E], N = ΣB lengths."""
    places_S = torch.arange(x_BSE.shape[1], device=x_BSE.device)
    return x_BSE[places_S[None, :] < lengths_B.to(x_BSE.device)[:, None]]
