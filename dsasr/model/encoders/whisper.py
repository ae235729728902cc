"""Whisper's encoder, and the audio towers built like it (Voxtral, Qwen2-Audio).

It runs on an utterance's own frames: positions are cut to them, padding is masked in both
convolutions and in attention, so that the frames do not depend on batch mates and no time goes
into 30 s of silence. ``pad_to: 30`` gives what the model was trained on.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsasr.data.audio.frontends import PretrainedFrontEnd
from dsasr.model.encoders.pretrained import (
    PretrainedEncoder,
    PretrainedEncoderConfig,
    construct,
)
from dsasr.model.encoders.protocol import valid_frames

CLASSES = {
    "whisper": ("whisper", "WhisperEncoder"),
    "qwen2_audio_encoder": ("qwen2_audio", "Qwen2AudioEncoder"),
    "voxtral_encoder": ("voxtral", "VoxtralEncoder"),
}


class Positions(nn.Module):
    """The table of sinusoids, never trained: a buffer, which no optimizer and no ZeRO stage has."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.register_buffer("weight", weight)

    def reset_table(self) -> None:
        """The sinusoids, for an encoder whose weights come from no file."""
        from transformers.models.whisper.modeling_whisper import sinusoids

        self.weight = sinusoids(*self.weight.shape)


class WhisperEncoder(PretrainedEncoder):
    """50 Hz frames from log-Mel features at 100 Hz."""

    anchor = "conv1.weight"
    stride = 2  # feature frames per encoder frame

    def __init__(self, settings: Any, cfg: PretrainedEncoderConfig):
        super().__init__(settings, cfg)
        self.width = settings.d_model
        self.frame_seconds = 0.01 * self.stride
        longest = settings.max_source_positions * 0.02
        self.front_end = PretrainedFrontEnd("whisper", settings.num_mel_bins, max_seconds=longest)
        self.model.embed_positions = Positions(self.model.embed_positions.weight.detach())

    def build(self, settings: Any) -> nn.Module:
        package, name = CLASSES[settings.model_type]
        place = f"transformers.models.{package}.modeling_{package}"
        return construct(getattr(importlib.import_module(place), name), settings)

    @property
    def blocks(self) -> nn.ModuleList:
        return self.model.layers

    def output_lengths(self, lengths_B: Tensor) -> Tensor:
        return (lengths_B + 1) // 2

    def _silence(self, features: Tensor | None = None, lengths_B: Tensor | None = None):
        """With ``pad_to`` the log-Mel of silence: the floor, 8 below the utterance's peak."""
        if features is None or not self.cfg.pad_to:
            return 0.0
        valid = valid_frames(lengths_B, features.shape[1]).unsqueeze(2)
        peaks = features.masked_fill(~valid, -torch.inf).amax((1, 2), keepdim=True)
        # (max(log p, peak − 8) + 4) / 4, where the log of silence is −10.
        return torch.maximum(peaks - 2.0, torch.full_like(peaks, -1.5))

    def _encode(self, features_BTF: Tensor, lengths_B: Tensor, out_lengths_B: Tensor) -> Tensor:
        x_BET = F.gelu(self.model.conv1(features_BTF.transpose(1, 2)))
        x_BET = x_BET * valid_frames(lengths_B, x_BET.shape[2]).unsqueeze(1).to(x_BET.dtype)
        x = F.gelu(self.model.conv2(x_BET)).transpose(1, 2)
        halves_B = (lengths_B + 1) // 2
        x = x + self.model.embed_positions.weight[: x.shape[1]].to(x.dtype)
        x = F.dropout(x, self.model.dropout, self.training)
        mask = valid_frames(halves_B, x.shape[1])[:, None, None, :]
        for block in self.blocks:
            x = block(x, mask)
            x = x[0] if isinstance(x, tuple) else x
        return self.model.layer_norm(self._pool(x))


class PooledWhisperEncoder(WhisperEncoder):
    """Qwen2-Audio's: pairs of frames are averaged, 25 Hz."""

    stride = 4

    def output_lengths(self, lengths_B: Tensor) -> Tensor:
        # A last frame without a partner is left out, but for the only one.
        return ((lengths_B + 1) // 2 // 2).clamp_min(1)

    def _pool(self, x_BSE: Tensor) -> Tensor:
        if x_BSE.shape[1] == 1:
            return x_BSE
        return self.model.avg_pooler(x_BSE.transpose(1, 2)).transpose(1, 2)
