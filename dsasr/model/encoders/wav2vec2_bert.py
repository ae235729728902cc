"""w2v-BERT 2.0: a Conformer over Kaldi filter banks stacked in pairs, 50 Hz."""

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


class Wav2Vec2BertEncoder(PretrainedEncoder):
    """One frame per pair of filter banks, 20 ms."""

    anchor = "feature_projection.projection.weight"
    frame_seconds = 0.02

    def __init__(self, settings: Any, cfg: PretrainedEncoderConfig):
        super().__init__(settings, cfg)
        self.width = settings.hidden_size
        self.front_end = PretrainedFrontEnd("w2v-bert", settings.feature_projection_input_dim)

    def build(self, settings: Any) -> nn.Module:
        from transformers import Wav2Vec2BertModel

        return construct(Wav2Vec2BertModel, settings)

    @property
    def blocks(self) -> nn.ModuleList:
        return self.model.encoder.layers

    def output_lengths(self, lengths_B: Tensor) -> Tensor:
        return lengths_B

    def _encode(self, features_BTF: Tensor, lengths_B: Tensor, out_lengths_B: Tensor) -> Tensor:
        valid = valid_frames(out_lengths_B, features_BTF.shape[1])
        return self.model(features_BTF, attention_mask=valid).last_hidden_state
