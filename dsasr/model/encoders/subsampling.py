"""The Conformer's convolutional subsampling: four feature frames to one encoder frame."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsasr.model.encoders.protocol import valid_frames
from dsasr.model.encoders.stream_state import StreamPast


class StridedConv(nn.Conv2d):
    """3 x 3 convolution, stride 2, over [B, C, T, F]; padded by one zero frame on either side.

    With ``before`` [B, C, 1, F], the frame before the input, an even number of frames needs no
    padding: the last output is centered on the last frame but one.

    It runs in channels-last memory whatever the layout of its weight (ZeRO-3 hands back plain
    rows): with one input channel that is 7x faster on a CPU, and cuDNN wants it for bf16.
    """

    def __init__(self, channels: int, out_channels: int):
        super().__init__(channels, out_channels, 3, stride=2, padding=(1, 0))

    def forward(self, input: Tensor, before: Tensor | None = None) -> Tensor:
        # A clone: with one channel `contiguous` leaves any layout as it is.
        weight = self.weight.clone(memory_format=torch.channels_last)
        if before is not None:
            input = torch.cat((before, input), dim=2)
        input = input.contiguous(memory_format=torch.channels_last)
        padding = self.padding if before is None else 0
        return F.conv2d(input, weight, self.bias, self.stride, padding)


class Subsampling(nn.Module):
    """[B, T, F] features to [B, ceil(T/4), E]: two strided convolutions and a projection."""

    def __init__(self, mels: int, channels: int, width: int):
        super().__init__()
        self.conv1 = StridedConv(1, channels)
        self.conv2 = StridedConv(channels, channels)
        bins = ((mels - 1) // 2 - 1) // 2
        self.project = nn.Linear(bins * channels, width)

    def forward(
        self,
        features_BTF: Tensor,
        lengths_B: Tensor,
        padded: bool,
        past: StreamPast | None = None,
    ) -> Tensor:
        """With ``past``, T is a multiple of 4, and ``past`` is brought up to the features' end."""
        x = features_BTF
        if padded:
            x = x.masked_fill(~valid_frames(lengths_B, x.shape[1]).unsqueeze(2), 0.0)
        x = x.unsqueeze(1)
        if past is not None:
            x, before = self.conv1(x, past.features_B11F), past.halved_BC1F
            past.features_B11F = features_BTF[:, None, -1:]
        else:
            x, before = self.conv1(x), None
        if padded:  # the bias has made the padding nonzero
            valid = valid_frames((lengths_B + 1) // 2, x.shape[2])
            # A product, in place: masked_fill's gradient would leave the channels-last layout.
            x = x.mul_(valid[:, None, :, None].to(x.dtype))
        x = F.relu_(x)
        if past is not None:
            past.halved_BC1F = x[:, :, -1:]
        x = F.relu_(self.conv2(x, before))
        return self.project(x.permute(0, 2, 3, 1).flatten(2))  # a view: channels are last
