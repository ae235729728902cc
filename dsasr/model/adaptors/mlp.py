"""The paper's adaptor: stacked encoder frames (25 Hz) through an MLP (6.25 Hz)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dsasr.kernels import dispatch
from dsasr.kernels.adaptor import AdaptorWeights
from dsasr.model.adaptors.protocol import ACTIVATION_RMS, AdaptorConfig, padded
from dsasr.model.encoders.protocol import valid_frames


class MlpAdaptor(nn.Module):
    """Stacks frames and applies a two-layer MLP, on valid frames only.

    The weights belong to this module itself, not to layers inside it, so that ZeRO-3 gathers them
    for the one kernel that reads them all.

    ``scale`` is the root mean square that the embeddings start with, for frames of unit variance
    (the encoder ends in a LayerNorm). Give it the language model's
    `dsasr.model.token_embeddings.token_rms` (**ours**): speech then enters the residual stream at
    the scale of tokens.
    """

    def __init__(self, cfg: AdaptorConfig, width: int, out_width: int, scale: float = 1.0):
        super().__init__()
        self.cfg = cfg
        self.scale = scale
        hidden = cfg.hidden or out_width
        self.weight1 = nn.Parameter(torch.empty(hidden, cfg.stack * width))
        self.bias1 = nn.Parameter(torch.empty(hidden))
        self.weight2 = nn.Parameter(torch.empty(out_width, hidden))
        self.bias2 = nn.Parameter(torch.empty(out_width))
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        hidden, stacked = self.weight1.shape
        std2 = self.scale / (ACTIVATION_RMS[self.cfg.activation] * hidden**0.5)
        nn.init.normal_(self.weight1, std=stacked**-0.5, generator=generator)
        nn.init.normal_(self.weight2, std=std2, generator=generator)
        nn.init.zeros_(self.bias1)
        nn.init.zeros_(self.bias2)

    def output_lengths(self, lengths_B: Tensor) -> Tensor:
        """Embeddings that ``lengths_B`` encoder frames give; a last, partial stack counts."""
        return (lengths_B + self.cfg.stack - 1) // self.cfg.stack

    def forward(
        self,
        frames_BSE: Tensor,
        lengths_B: Tensor,
        packed: bool = False,
        out_LD: Tensor | None = None,
        index_N: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """See `dsasr.model.adaptors.protocol.Adaptor`. Frames beyond ``lengths_B`` count as zeros
        in a last, partial stack."""
        weights = AdaptorWeights(
            self.weight1,
            self.bias1,
            self.weight2,
            self.bias2,
            stack=self.cfg.stack,
            activation=self.cfg.activation,
        )
        embeds, out_lengths_B = dispatch.adaptor(
            frames_BSE, lengths_B, weights, out_LD=out_LD, index_N=index_N
        )
        if packed or out_LD is not None:
            return embeds, out_lengths_B
        valid_BA = valid_frames(out_lengths_B, -(-frames_BSE.shape[1] // self.cfg.stack))
        return padded(embeds, valid_BA), out_lengths_B
