"""Units as frames of simulated speech, for the pre-training of the demo's LM (**ours**).

The demo's adaptor is of kind mlp: its speech tokens are frames of a fixed length, most with more
than one phoneme. So the demo's LM reads text-only batches in such frames, not unit by unit, which
it also learns far later.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsasr.model.adaptors.ctc import CtcAdaptor
from dsasr.model.adaptors.protocol import AdaptorConfig
from dsasr.model.encoders.protocol import valid_frames

HALF = 0.08  # seconds of half a frame
SHORTEST, LONGEST = 0.04, 0.16  # seconds of a unit
RATES = (0.8, 1.25)  # an utterance's units are longer or shorter by this factor
LEAD = 0.2  # seconds of silence before an utterance, at most


class SimulatedFrames(CtcAdaptor):
    """The CTC adaptor for text-only batches whose units have drawn durations.

    A frame is the sum of the embeddings of the units in its first half and in its second half, each
    half with its own table: the inputs [B, A, 2P] count them. Draws from torch's generator, which
    `SpeechLLM` seeds from the batch.
    """

    def __init__(self, out_width: int, scale: float, units: int):
        super().__init__(AdaptorConfig(kind="ctc"), 0, out_width, scale, 2 * units)

    def read_units(self, units_BK: Tensor, lengths_B: Tensor) -> tuple[Tensor, Tensor]:
        shape, utterances = units_BK.shape, len(units_BK)
        rate_B1 = torch.empty(utterances, 1).uniform_(*RATES)
        seconds_BK = rate_B1 * torch.empty(shape).uniform_(SHORTEST, LONGEST)
        ends_BK = LEAD * torch.rand(utterances, 1) + seconds_BK.cumsum(1)
        halves_BK = ((ends_BK - 0.5 * seconds_BK) / HALF).long()
        columns_BK = units_BK + (self.units // 2) * (halves_BK % 2)
        last_B = (halves_BK // 2).gather(1, lengths_B[:, None] - 1)[:, 0]
        frames_B = last_B + 1 + torch.randint(2, (utterances,))
        inputs = self.table.new_zeros(utterances, int(frames_B.max()), self.units)
        row_N, place_N = valid_frames(lengths_B, shape[1]).nonzero(as_tuple=True)
        at = row_N, (halves_BK // 2)[row_N, place_N], columns_BK[row_N, place_N]
        return inputs.index_put_(at, inputs.new_ones(()), accumulate=True), frames_B
