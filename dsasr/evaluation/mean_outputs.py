"""Means of a model's outputs, such as its loss, on a set of batches, over all ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch

from dsasr.data.batch import Batch
from dsasr.model.ctc_model import CtcModel
from dsasr.model.speech_llm import SpeechLLM


@torch.no_grad()
def mean_outputs(
    model: CtcModel | SpeechLLM,
    batches: Iterable[Batch],
    names: Sequence[str],
    *,
    device: torch.device,
    sum_ranks: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor,
) -> list[float]:
    """Σ total / Σ count of each of ``names`` of the model's sums; NaN where nothing was counted.

    The phoneme error rate is that of "phoneme_errors": edits of the CTC head's best path over
    reference phonemes. Every rank must bring equally many batches, since the model's forward pass
    is collective under ZeRO-3. ``sum_ranks`` adds a tensor up over all ranks.
    """
    sums_N2 = torch.zeros(len(names), 2, dtype=torch.float64, device=device)
    for batch in batches:
        sums = model(batch.to(device)).sums
        for row, name in enumerate(names):
            total, count = sums[name]
            sums_N2[row] += torch.stack([torch.as_tensor(total), torch.as_tensor(count)]).to(
                sums_N2
            )
    return [
        total / count if count else float("nan") for total, count in sum_ranks(sums_N2).tolist()
    ]
