"""Qwen3-ASR's audio encoder: convolutions over seconds of audio, attention over windows of them.

Its own forward pass works on packed valid frames, so that they do not depend on batch mates. Of
every 100 log-Mel frames (1 s) it makes 13.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dsasr.data.audio.frontends import PretrainedFrontEnd
from dsasr.model.encoders.pretrained import (
    PretrainedEncoder,
    PretrainedEncoderConfig,
    construct,
)
from dsasr.model.encoders.protocol import valid_frames


class Qwen3AsrEncoder(PretrainedEncoder):
    """13 Hz frames from log-Mel features at 100 Hz."""

    anchor = "conv2d1.weight"

    def __init__(self, settings: Any, cfg: PretrainedEncoderConfig):
        super().__init__(settings, cfg)
        self.width = settings.d_model
        self.chunk = 2 * settings.n_window
        self.frame_seconds = 0.01 * self.chunk / _halved(self.chunk)
        self.front_end = PretrainedFrontEnd("whisper", settings.num_mel_bins)

    def build(self, settings: Any) -> nn.Module:
        from transformers.models.qwen3_asr.modeling_qwen3_asr import Qwen3ASREncoder

        return construct(Qwen3ASREncoder, settings)

    @property
    def blocks(self) -> nn.ModuleList:
        return self.model.layers

    def output_lengths(self, lengths_B: Tensor) -> Tensor:
        whole, rest = lengths_B // self.chunk, lengths_B % self.chunk
        return whole * _halved(self.chunk) + torch.where(rest > 0, _halved(rest), 0)

    def _encode(self, features_BTF: Tensor, lengths_B: Tensor, out_lengths_B: Tensor) -> Tensor:
        features_BTF = nn.functional.pad(
            features_BTF, (0, 0, 0, -features_BTF.shape[1] % self.chunk)
        )
        mask_BT = valid_frames(lengths_B, features_BTF.shape[1]).long()
        packed = self.model(
            input_features=features_BTF.transpose(1, 2), input_features_mask=mask_BT
        ).last_hidden_state
        return self._unpacked(packed, out_lengths_B)

    def _unpacked(self, block_output: Tensor, out_lengths_B: Tensor) -> Tensor:
        valid_BS = valid_frames(out_lengths_B, int(out_lengths_B.max()))
        rows = block_output.new_zeros(valid_BS.numel(), block_output.shape[1])
        index_N = valid_BS.flatten().nonzero().squeeze(1)
        return rows.index_copy(0, index_N, block_output).view(*valid_BS.shape, -1)


def _halved(length: Any) -> Any:
    """Frames after three convolutions of stride 2, kernel 3 and padding 1."""
    for _ in range(3):
        length = (length - 1) // 2 + 1
    return length
