"""Mean and deviation of each channel of an encoder's frames, which a CTC head takes out first."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dsasr.data.batch import Batch
from dsasr.engine.branch_engine import BranchEngine
from dsasr.model.encoders.protocol import silence_shape, valid_frames
from dsasr.utils import distributed


def measure(engine: BranchEngine, batches: Sequence[Batch]) -> bool:
    """Give the pretrain branch's CTC head the statistics of the frames of ``batches``.

    They are measured at a run's first step, over all ranks, without SpecAugment. A head that has
    statistics already, from a checkpoint or another model, keeps them; a head without convolutions
    needs none. Returns whether the head has what it needs; False where no rank has an utterance.
    Collective.
    """
    head = engine.module.ctc
    if not head.layers or bool(head.frame_std_E.any()):
        return True
    sums_3E = torch.zeros(
        3, len(head.frame_mean_E), dtype=torch.float64, device=head.frame_mean_E.device
    )
    with engine.evaluating() as module:
        for batch in batches:
            spoken = batch.or_silence(silence_shape(module.encoder)).to(distributed.device())
            output = module.encoder(spoken.features_BTF, spoken.feature_lengths_B)
            if not len(batch):
                continue
            frames_NE = output.frames_BSE[
                valid_frames(output.lengths_B, output.frames_BSE.shape[1])
            ].double()
            sums_3E += torch.stack(
                (
                    torch.full_like(frames_NE[0], len(frames_NE)),
                    frames_NE.sum(0),
                    (frames_NE**2).sum(0),
                )
            )
    distributed.all_reduce_sum(sums_3E)
    count_E, total_E, squares_E = sums_3E
    if not bool(count_E.any()):
        return False
    mean_E = total_E / count_E
    head.frame_mean_E.copy_(mean_E)
    head.frame_std_E.copy_((squares_E / count_E - mean_E**2).clamp_min(0).sqrt())
    return True
