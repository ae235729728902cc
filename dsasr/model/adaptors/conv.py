"""The convolutional adaptor: one or two strided convolutions over time, then a linear layer.

``stack`` is the stride of all together, so a speech token comes of as many frames as one of the
MLP. Two convolutions share it where it has two factors (4 = 2 · 2, 6 = 2 · 3); a prime one has one
convolution. A convolution of stride s sees 2s − 1 frames: one on either side of its own for s = 2,
as in Whisper's front end. Token a therefore sees nothing after frame stack · (a + 1) − 1.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsasr.data.batch import upload
from dsasr.kernels.adaptor import ACTIVATIONS
from dsasr.model.adaptors.protocol import ACTIVATION_RMS, AdaptorConfig, deliver, pack
from dsasr.model.encoders.protocol import valid_frames


def strides(stack: int) -> tuple[int, ...]:
    """Strides of the convolutions, whose product is ``stack``: two as near each other as they can
    be, the smaller one first; or one."""
    first = max(s for s in range(1, stack + 1) if s * s <= stack and stack % s == 0)
    return (first, stack // first) if first > 1 else (stack,)


def kernel(stride: int) -> int:
    """Frames that a convolution of that stride sees."""
    return 2 * stride - 1


class ConvAdaptor(nn.Module):
    """Encoder frames [B, S, E] to embeddings [B, A, D]; ``hidden`` channels in between.

    The weights belong to this module itself, so that ZeRO-3 gathers them at once. ``scale`` is the
    root mean square that the embeddings start with, for frames of unit variance.
    """

    def __init__(self, cfg: AdaptorConfig, width: int, out_width: int, scale: float = 1.0):
        super().__init__()
        self.cfg, self.scale = cfg, scale
        self.strides, hidden = strides(cfg.stack), cfg.hidden or out_width
        self.weight1 = nn.Parameter(torch.empty(hidden, width, kernel(self.strides[0])))
        self.bias1 = nn.Parameter(torch.empty(hidden))
        self.weight2 = self.bias2 = None
        if len(self.strides) > 1:
            self.weight2 = nn.Parameter(torch.empty(hidden, hidden, kernel(self.strides[1])))
            self.bias2 = nn.Parameter(torch.empty(hidden))
        self.weight = nn.Parameter(torch.empty(out_width, hidden))
        self.bias = nn.Parameter(torch.empty(out_width))
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        rms = ACTIVATION_RMS[self.cfg.activation]
        gains = (1.0, 1 / rms, self.scale / rms)  # over the root mean square of what each reads
        for weight, gain in zip((self.weight1, self.weight2, self.weight), gains, strict=True):
            if weight is not None:
                std = gain / weight[0].numel() ** 0.5
                nn.init.normal_(weight, std=std, generator=generator)
        for bias in filter(lambda bias: bias is not None, (self.bias1, self.bias2, self.bias)):
            nn.init.zeros_(bias)

    def output_lengths(self, lengths_B: Tensor) -> Tensor:
        """Embeddings that ``lengths_B`` encoder frames give: ceil(S / stack)."""
        return (lengths_B + self.cfg.stack - 1) // self.cfg.stack

    def _convolutions(self) -> Iterator[tuple[Tensor, Tensor, int]]:
        yield self.weight1, self.bias1, self.strides[0]
        if self.weight2 is not None:
            yield self.weight2, self.bias2, self.strides[1]

    def forward(
        self,
        frames_BSE: Tensor,
        lengths_B: Tensor,
        packed: bool = False,
        out_LD: Tensor | None = None,
        index_N: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """See `dsasr.model.adaptors.protocol.Adaptor`. Frames beyond ``lengths_B`` are zeros to
        every convolution."""
        activation = ACTIVATIONS[self.cfg.activation]
        x_BSC, counts_B = frames_BSE.to(self.weight1.dtype), lengths_B
        for weight, bias, stride in self._convolutions():
            valid_BS = upload(valid_frames(counts_B, x_BSC.shape[1]), x_BSC.device)
            x_BCS = x_BSC.masked_fill(~valid_BS.unsqueeze(2), 0.0).transpose(1, 2)
            x_BCS = F.conv1d(x_BCS, weight, bias, stride=stride, padding=stride - 1)
            x_BSC, counts_B = activation(x_BCS).transpose(1, 2), (counts_B + stride - 1) // stride
        embeds_ND = F.linear(pack(x_BSC, counts_B), self.weight, self.bias)
        return deliver(embeds_ND, counts_B, x_BSC.shape[1], packed, out_LD, index_N), counts_B
