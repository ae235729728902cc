"""wav2vec 2.0, HuBERT, WavLM, UniSpeech and data2vec-audio: raw waves at 16 kHz to 50 Hz frames.

Padding is kept out of the two places where transformers lets it in: the base models' group norm
over time, which takes its statistics over the whole row, and data2vec's stacked positional
convolutions, whose second layer sees what the first made of the padding.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from dsasr.data.audio.frontends import PretrainedFrontEnd
from dsasr.model.encoders.pretrained import (
    RATE,
    PretrainedEncoder,
    PretrainedEncoderConfig,
    construct,
)
from dsasr.model.encoders.protocol import valid_frames

CLASSES = {
    "wav2vec2": ("wav2vec2", "wav2vec2", "Wav2Vec2Model"),
    "hubert": ("hubert", "hubert", "HubertModel"),
    "wavlm": ("wavlm", "wavlm", "WavLMModel"),
    "unispeech": ("unispeech", "unispeech", "UniSpeechModel"),
    "unispeech-sat": ("unispeech_sat", "unispeech_sat", "UniSpeechSatModel"),
    "data2vec-audio": ("data2vec", "data2vec_audio", "Data2VecAudioModel"),
}


class MaskedGroupNorm(nn.GroupNorm):
    """Instance norm over time, [B, C, T], whose statistics are the valid frames' alone."""

    lengths_B: Tensor | None = None  # set before each forward pass

    def forward(self, input: Tensor) -> Tensor:
        valid_B1T = valid_frames(self.lengths_B, input.shape[2]).unsqueeze(1)
        count = self.lengths_B.view(-1, 1, 1)
        x = input.to(torch.promote_types(input.dtype, torch.float32))
        mean = (x * valid_B1T).sum(2, keepdim=True) / count
        variance = ((x - mean).square() * valid_B1T).sum(2, keepdim=True) / count
        x = (x - mean) * torch.rsqrt(variance + self.eps)
        return (x.to(input.dtype) * self.weight[:, None] + self.bias[:, None]) * valid_B1T


class Wav2Vec2Encoder(PretrainedEncoder):
    """50 Hz frames from the waveform."""

    anchor = "feature_projection.projection.weight"

    def __init__(self, settings: Any, cfg: PretrainedEncoderConfig):
        super().__init__(settings, cfg)
        self.width = settings.hidden_size
        self.kernels = list(zip(settings.conv_kernel, settings.conv_stride, strict=True))
        step = 1
        for _, stride in self.kernels:
            step *= stride
        self.frame_seconds = step / RATE
        if settings.model_type == "wavlm":  # one function of torch's takes all four weights
            self.read_past_forward = ("q_proj", "k_proj", "v_proj", "out_proj")
        self.front_end = PretrainedFrontEnd(
            "wave", 1, normalize=getattr(settings, "do_normalize", True)
        )
        first = self.model.feature_extractor.conv_layers[0]
        self._norm = getattr(first, "layer_norm", None)
        if isinstance(self._norm, nn.GroupNorm):
            masked = MaskedGroupNorm(self._norm.num_groups, self._norm.num_channels, self._norm.eps)
            masked.weight, masked.bias = self._norm.weight, self._norm.bias
            first.layer_norm = masked
        else:
            self._norm = None
        self._fold_weight_norm()

    def build(self, settings: Any) -> nn.Module:
        package, file, name = CLASSES[settings.model_type]
        module = importlib.import_module(f"transformers.models.{package}.modeling_{file}")
        return construct(getattr(module, name), settings)

    def _fold_weight_norm(self) -> None:
        """The positional convolution's weight as one parameter, which ZeRO-3 can partition."""
        conv = getattr(self.model.encoder.pos_conv_embed, "conv", None)
        if conv is not None and parametrize.is_parametrized(conv, "weight"):
            parametrize.remove_parametrizations(conv, "weight", leave_parametrized=True)

    @property
    def blocks(self) -> nn.ModuleList:
        return self.model.encoder.layers

    def output_lengths(self, lengths_B: Tensor) -> Tensor:
        for kernel, stride in self.kernels:
            lengths_B = (lengths_B - kernel) // stride + 1
        return lengths_B

    def _encode(self, features_BTF: Tensor, lengths_B: Tensor, out_lengths_B: Tensor) -> Tensor:
        extractor = self.model.feature_extractor
        if self._norm is not None:
            kernel, stride = self.kernels[0]
            extractor.conv_layers[0].layer_norm.lengths_B = (lengths_B - kernel) // stride + 1
        x_BCS = features_BTF.transpose(1, 2)
        for layer in extractor.conv_layers:
            x_BCS = layer(x_BCS)
        projected = self.model.feature_projection(x_BCS.transpose(1, 2))
        x = projected[0] if isinstance(projected, tuple) else projected
        valid = valid_frames(out_lengths_B, x.shape[1])
        # A copy: transformers zeroes the padding in place.
        return self.model.encoder(x.clone(), attention_mask=valid).last_hidden_state


class MaskedPositionalConv(nn.Module):
    """data2vec's stacked positional convolutions with the padding zeroed before each."""

    lengths_B: Tensor | None = None  # set before each forward pass

    def __init__(self, layers: nn.ModuleList):
        super().__init__()
        self.layers = layers

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = hidden_states.transpose(1, 2)
        valid = valid_frames(self.lengths_B, x.shape[2]).unsqueeze(1)
        for layer in self.layers:
            x = layer(x * valid)
        return x.transpose(1, 2)


class Data2VecEncoder(Wav2Vec2Encoder):
    """data2vec-audio: five positional convolutions, one after the other."""

    def __init__(self, settings: Any, cfg: PretrainedEncoderConfig):
        super().__init__(settings, cfg)
        encoder = self.model.encoder
        encoder.pos_conv_embed = MaskedPositionalConv(encoder.pos_conv_embed.layers)

    def _encode(self, features_BTF: Tensor, lengths_B: Tensor, out_lengths_B: Tensor) -> Tensor:
        self.model.encoder.pos_conv_embed.lengths_B = out_lengths_B
        return super()._encode(features_BTF, lengths_B, out_lengths_B)
