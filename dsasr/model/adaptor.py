"""The adaptor: encoder frames (25 Hz) to embeddings in the language model's space (6.25 Hz)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dsasr.kernels import dispatch
from dsasr.kernels.adaptor import AdaptorWeights
from dsasr.model.encoders.protocol import valid_frames
from dsasr.utils.errors import UserError

# Root mean square of activation(x) for x ~ N(0, 1).
_RMS = {"gelu": 0.6521, "silu": 0.5968, "relu": 0.7071}


@dataclass(frozen=True)
class AdaptorConfig:
    """``stack`` consecutive frames are concatenated; ``hidden`` 0 is the language model's width."""

    stack: int = 4  # consecutive encoder frames concatenated into one speech token
    hidden: int = 0  # inner width; 0: the language model's width
    activation: str = "gelu"  # gelu, silu or relu

    def __post_init__(self) -> None:
        if self.stack < 1 or self.hidden < 0:
            raise UserError("adaptor: stack must be at least 1 and hidden at least 0")
        if self.activation not in _RMS:
            raise UserError(
                f"adaptor activation {self.activation!r}: choose one of {', '.join(_RMS)}"
            )


class Adaptor(nn.Module):
    """Stacks frames and applies a two-layer MLP, on valid frames only.

    The weights belong to this module itself, not to layers inside it, so that ZeRO-3 gathers them
    for the one kernel that reads them all.

    ``scale`` is the root mean square that the embeddings start with, for frames of unit variance
    (the encoder ends in a LayerNorm). Give it that of the language model's token embeddings
    (**ours**): speech then enters the residual stream at the scale of tokens.
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
        std2 = self.scale / (_RMS[self.cfg.activation] * hidden**0.5)
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
        """Embeddings [B, A, D], zero where padded, or ``packed`` [N, D]; and their lengths_B.

        Frames beyond ``lengths_B`` count as zeros in a last, partial stack. With ``out_LD`` the
        valid embeddings are written to its rows ``index_N`` in place, and it is returned. With
        lengths on the CPU the host does not wait for a GPU.
        """
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
        padded = embeds.new_zeros(valid_BA.numel(), embeds.shape[1])
        index_N = valid_BA.flatten().nonzero().squeeze(1).to(embeds.device)
        return padded.index_copy(0, index_N, embeds).view(*valid_BA.shape, -1), out_lengths_B
