"""Parakeet (NVIDIA's FastConformer): natural-log Mel features at 100 Hz to 12.5 Hz frames."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from dsasr.data.audio.frontends import PretrainedFrontEnd
from dsasr.model.encoders.pretrained import (
    PretrainedEncoder,
    PretrainedEncoderConfig,
    construct,
)
from dsasr.model.encoders.protocol import valid_frames


class ParakeetEncoder(PretrainedEncoder):
    """Eightfold subsampling; BatchNorm keeps the statistics of its training."""

    anchor = "subsampling.linear.weight"

    def __init__(self, settings: Any, cfg: PretrainedEncoderConfig):
        super().__init__(settings, cfg)
        self.width = settings.hidden_size
        self.frame_seconds = 0.01 * settings.subsampling_factor
        self.front_end = PretrainedFrontEnd("parakeet", settings.num_mel_bins)

    def build(self, settings: Any) -> nn.Module:
        from transformers.models.parakeet.modeling_parakeet import ParakeetEncoder as Model

        return construct(Model, settings)

    @property
    def blocks(self) -> nn.ModuleList:
        return self.model.layers

    def output_lengths(self, lengths_B: Tensor) -> Tensor:
        stride = self.settings.subsampling_conv_stride
        kernel = self.settings.subsampling_conv_kernel_size
        factor = 1
        while factor < self.settings.subsampling_factor:
            lengths_B = (lengths_B + 2 * ((kernel - 1) // 2) - kernel) // stride + 1
            factor *= stride
        return lengths_B

    def _encode(self, features_BTF: Tensor, lengths_B: Tensor, out_lengths_B: Tensor) -> Tensor:
        valid = valid_frames(lengths_B, features_BTF.shape[1])
        return self.model(features_BTF, attention_mask=valid).last_hidden_state
