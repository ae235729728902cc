"""The audio tower of Qwen3-ASR: log-Mel features at 100 Hz to 13 frames a second.

Each second of features goes through three convolutions by itself, with positions of its own, and
frames attend to those of their window of eight seconds. So an utterance's frames depend neither on
batch mates nor on what lies more than a window away.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.qwen3_asr import modeling_qwen3_asr as qwen3_asr

from dsasr.data.audio.frontends import PretrainedFrontEnd
from dsasr.model.encoders.pretrained import (
    PretrainedEncoder,
    PretrainedEncoderConfig,
    construct,
)
from dsasr.model.encoders.protocol import valid_frames


class WindowAttention(qwen3_asr.Qwen3ASRAudioAttention):
    """Attention within windows of a padded batch, in place of one over packed utterances, whose
    bounds have to be known on the host."""

    def forward(self, hidden_states: Tensor, cu_seqlens: Tensor, **_: Any) -> Tensor:
        """``hidden_states`` [B, S, E], S a multiple of the window W; ``cu_seqlens`` (the layer's
        name for it): which frames exist, bool [B · S / W, 1, 1, W]."""
        window = cu_seqlens.shape[-1]

        def heads(x_BSE: Tensor) -> Tensor:
            split = x_BSE.reshape(-1, window, self.num_heads, self.head_dim)
            return split.transpose(1, 2)

        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (heads(project(hidden_states)) for project in projections)
        dropout = self.dropout if self.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=cu_seqlens, dropout_p=dropout)
        return self.out_proj(out.transpose(1, 2).reshape(hidden_states.shape))


class Qwen3AsrEncoder(PretrainedEncoder):
    """A last second that is not whole is padded with zeros, as by its own feature extractor."""

    anchor = "conv2d1.weight"

    def __init__(self, settings: Any, cfg: PretrainedEncoderConfig):
        super().__init__(settings, cfg)
        self.width = settings.d_model
        self.chunk = 2 * settings.n_window  # feature frames that are convolved together
        self.chunk_frames = _convolved(self.chunk)
        self.window = settings.n_window_infer // self.chunk * self.chunk_frames
        self.frame_seconds = 0.01 * self.chunk / self.chunk_frames
        self.front_end = PretrainedFrontEnd("whisper", settings.num_mel_bins)

    def build(self, settings: Any) -> nn.Module:
        model = construct(qwen3_asr.Qwen3ASREncoder, settings)
        for layer in model.layers:
            layer.self_attn = WindowAttention(settings)
        return model

    @property
    def blocks(self) -> nn.ModuleList:
        return self.model.layers

    def output_lengths(self, lengths_B: Tensor) -> Tensor:
        whole, rest = lengths_B // self.chunk, lengths_B % self.chunk
        return whole * self.chunk_frames + _convolved(rest)

    def _encode(self, features_BTF: Tensor, lengths_B: Tensor, out_lengths_B: Tensor) -> Tensor:
        batch, steps, bins = features_BTF.shape
        features = F.pad(features_BTF, (0, 0, 0, -steps % self.chunk))
        x = features.reshape(-1, self.chunk, bins).transpose(1, 2).unsqueeze(1)
        for convolve in (self.model.conv2d1, self.model.conv2d2, self.model.conv2d3):
            x = F.gelu(convolve(x))
        x = self.model.conv_out(x.permute(0, 3, 1, 2).flatten(2))
        positions = self.model.positional_embedding.positional_embedding
        x = (x + positions[: self.chunk_frames].to(x.dtype)).reshape(batch, -1, x.shape[-1])
        window = min(self.window, x.shape[1])
        x = F.pad(x, (0, 0, 0, -x.shape[1] % window))
        valid_BS = valid_frames(out_lengths_B, x.shape[1])
        mask = valid_BS.reshape(-1, 1, 1, window)
        # A window without frames sees itself: softmax over nothing is not finite.
        mask = mask | ~mask.any(-1, keepdim=True)
        for block in self.blocks:
            (x,) = block(x, mask)
        return self.model.ln_post(x)


def _convolved(lengths: Any) -> Any:
    """Frames after three convolutions of stride 2; of a number or a tensor."""
    for _ in range(3):
        lengths = (lengths + 1) // 2
    return lengths
