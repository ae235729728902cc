"""The CTC adaptor: the language model reads what the CTC head writes (LegoSLM, arXiv 2505.11352).

A speech token is the embedding expected under the head's posterior, Σ_u p(u) · table[u]. The head
writes sounds, the language model reads them: text alone can train the table and the reading
(`dsasr.data.dataloader.text_dataloader`), and the encoder can be exchanged for another one with the
same units.

With ``merge`` there is a speech token for each unit that greedy CTC writes: consecutive frames with
the same best unit are one segment, and segments of blank are left out. A segment's posterior is the
mean over its frames, without blank (**ours**). Without it every frame is a speech token.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dsasr.model.adaptors.protocol import AdaptorConfig, deliver, pack
from dsasr.model.ctc import BLANK, unit_starts
from dsasr.model.encoders.protocol import valid_frames


class CtcAdaptor(nn.Module):
    """Posteriors [B, K, P], or [B, K, P + E] with ``cfg.frames``, to embeddings [B, K, D].

    ``units`` is P, blank included. The table starts with the language model's own embeddings of
    what the units are written with (`dsasr.build`). `read` makes the inputs from the head's
    output, `read_units` from units that are known.
    """

    def __init__(
        self, cfg: AdaptorConfig, width: int, out_width: int, scale: float = 1.0, units: int = 0
    ):
        super().__init__()
        self.cfg, self.scale, self.units, self.width = cfg, scale, units, width
        self.table = nn.Parameter(torch.empty(units, out_width))
        self.project = nn.Parameter(torch.empty(out_width, width)) if cfg.frames else None
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        nn.init.normal_(self.table, std=self.scale, generator=generator)
        if self.project is not None:
            nn.init.zeros_(self.project)

    def output_lengths(self, lengths_B: Tensor) -> Tensor:
        return lengths_B

    def read(
        self, log_probs_BSP: Tensor, frames_BSE: Tensor, lengths_B: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The inputs of `forward` from the head's log-probabilities; their lengths_B, on the CPU.

        With ``merge`` the host waits for the device: how many units are written is seen there.
        """
        posteriors = (log_probs_BSP / self.cfg.temperature).softmax(-1)
        inputs = posteriors.to(frames_BSE.dtype)
        if not self.cfg.merge:
            inputs = torch.cat((inputs, frames_BSE), -1) if self.cfg.frames else inputs
            return inputs, lengths_B.cpu()
        segment_BS, count_B = self._segments(log_probs_BSP.detach(), lengths_B)
        inputs = inputs.masked_fill(torch.arange(self.units, device=inputs.device) == BLANK, 0.0)
        inputs = torch.cat((inputs, frames_BSE), -1) if self.cfg.frames else inputs
        merged = _segment_means(inputs, segment_BS, int(count_B.max()))
        # Without blank the rest of a posterior is renormalized.
        whole = merged[..., : self.units].sum(-1, keepdim=True).clamp_min(1e-6)
        merged = torch.cat((merged[..., : self.units] / whole, merged[..., self.units :]), -1)
        return merged, count_B

    def read_units(self, units_BK: Tensor, lengths_B: Tensor) -> Tensor:
        """The inputs of `forward` from units that are known: one-hot, without frames."""
        inputs = nn.functional.one_hot(units_BK, self.units).to(self.table.dtype)
        if self.cfg.frames:
            inputs = nn.functional.pad(inputs, (0, self.width))
        return inputs * valid_frames(lengths_B, inputs.shape[1]).unsqueeze(2)

    def _segments(self, log_probs_BSP: Tensor, lengths_B: Tensor) -> tuple[Tensor, Tensor]:
        """Each frame's segment [B, S], -1 for none; and the segments of each utterance on the CPU.

        An utterance of blanks alone has one segment of all its frames: the language model then
        reads one token, of whatever is likeliest beside blank.
        """
        best_BS = log_probs_BSP.argmax(-1)
        starts_BS, written_BS = unit_starts(best_BS, lengths_B)
        segment_BS = (starts_BS.cumsum(1) - 1).masked_fill(~written_BS, -1)
        count_B = starts_BS.sum(1)
        silent_B1 = (count_B == 0).unsqueeze(1)
        valid_BS = valid_frames(lengths_B.to(best_BS.device), best_BS.shape[1])
        segment_BS = segment_BS.masked_fill(silent_B1 & valid_BS, 0)
        return segment_BS, count_B.clamp_min(1).cpu()

    def forward(
        self,
        frames_BSE: Tensor,
        lengths_B: Tensor,
        packed: bool = False,
        out_LD: Tensor | None = None,
        index_N: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """See `dsasr.model.adaptors.protocol.Adaptor`; ``frames_BSE`` are those of `read`."""
        inputs_NE = pack(frames_BSE, lengths_B)
        embeds_ND = inputs_NE[:, : self.units] @ self.table
        if self.project is not None:
            embeds_ND = embeds_ND + inputs_NE[:, self.units :] @ self.project.T
        slots = frames_BSE.shape[1]
        return deliver(embeds_ND, lengths_B, slots, packed, out_LD, index_N), lengths_B


def _segment_means(inputs_BSX: Tensor, segment_BS: Tensor, segments: int) -> Tensor:
    """Means over the frames of each segment, [B, segments, X]; zero where there are none."""
    share = nn.functional.one_hot(segment_BS + 1, segments + 1)[..., 1:].to(inputs_BSX.dtype)
    share = share / share.sum(1, keepdim=True).clamp_min(1.0)
    return share.transpose(1, 2) @ inputs_BSX
