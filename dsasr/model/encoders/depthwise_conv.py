"""The Conformer's depthwise convolution, over whole utterances and chunk by chunk."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsasr.model.dynamic_chunks import Chunk


class DepthwiseConv(nn.Module):
    """Depthwise convolution over time, [B, S, C] to [B, S, C], same length.

    With a chunk, a frame sees its own chunk and the ``kernel // 2`` frames before it, wherever
    those lie; frames beyond the chunk's end count as zeros, as those beyond an utterance's end do.
    """

    def __init__(self, channels: int, kernel: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, kernel))
        self.bias = nn.Parameter(torch.empty(channels))
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        bound = 1 / math.sqrt(self.weight.shape[2])
        nn.init.uniform_(self.weight, -bound, bound, generator=generator)
        nn.init.uniform_(self.bias, -bound, bound, generator=generator)

    def forward(self, x_BSC: Tensor, chunk: Chunk | None, past_BHC: Tensor | None = None) -> Tensor:
        """``past_BHC``: the ``kernel // 2`` frames before the input, which is one chunk."""
        half = self.weight.shape[2] // 2
        if past_BHC is not None:
            return self._convolve(F.pad(torch.cat((past_BHC, x_BSC), 1), (0, 0, 0, half)), 0)
        if chunk is None or chunk.size >= x_BSC.shape[1]:
            return self._convolve(x_BSC, half)
        B, S, C = x_BSC.shape
        size = chunk.size
        pieces = -(-S // size)
        padded = F.pad(x_BSC, (0, 0, half, pieces * size - S))
        windows = padded.unfold(1, half + size, size).transpose(2, 3)  # [B, pieces, half + size, C]
        windows = F.pad(windows, (0, 0, 0, half)).flatten(0, 1)
        # The result is laid out as the device likes it: a copy on some.
        return self._convolve(windows, 0).reshape(B, pieces * size, C)[:, :S]

    def _convolve(self, x_BSC: Tensor, padding: int) -> Tensor:
        # Seen as a channels-last image of one row, [B, S, C] needs no transposed copy.
        image = x_BSC.transpose(1, 2).unsqueeze(2)
        y = F.conv2d(
            image,
            self.weight.unsqueeze(2),
            self.bias,
            padding=(0, padding),
            groups=self.weight.shape[0],
        )
        return y.squeeze(2).transpose(1, 2)
