"""The phoneme error rate of a `CtcModel` on a set of batches, over all ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from dsasr.data.batch import Batch
from dsasr.model.ctc_model import CtcModel


@torch.no_grad()
def phoneme_error_rate(
    model: CtcModel,
    batches: Iterable[Batch],
    *,
    device: torch.device,
    sum_ranks: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor,
) -> float:
    """Edits of the CTC head's best path over reference phonemes; NaN without a reference phoneme.

    Every rank must bring equally many batches, since the model's forward pass is collective under
    ZeRO-3. ``sum_ranks`` adds a tensor up over all ranks.
    """
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    for batch in batches:
        errors, count = model(batch.to(device)).sums["phoneme_errors"]
        sums += torch.stack([errors, count]).to(sums)
    errors, count = sum_ranks(sums).tolist()
    return errors / count if count else float("nan")
