"""Conformer encoder in the shape of FireRedASR-AED's, with dynamic chunks.

One mask rule keeps an utterance's result free of the batch that it came in: padded frames are
zeroed before every convolution over time and hidden from every query. One alignment rule keeps
streaming exact: output frame s is centered on feature frame 4s and sees features 4s - 3 … 4s + 3,
so that the frames of a chunk [c·i, c·(i + 1)) see nothing from feature frame 4c·(i + 1) on. **The
look-ahead beyond a chunk's end is zero frames.**
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsasr.model import activation_checkpointing, weight_init
from dsasr.model.attention import attend
from dsasr.model.dynamic_chunks import Chunk
from dsasr.model.encoders.depthwise_conv import DepthwiseConv
from dsasr.model.encoders.protocol import EncoderOutput, valid_frames
from dsasr.model.encoders.stream_state import EncoderStream, LayerPast, StreamPast
from dsasr.model.encoders.subsampling import Subsampling
from dsasr.model.weight_init import ResidualLinear
from dsasr.utils import ranges
from dsasr.utils.errors import UserError
from dsasr.utils.ranges import Dropout, Range

BRANCHES = 4  # of a block: two feed-forward modules, attention, convolution


@dataclass(frozen=True)
class EncoderConfig:
    """Sizes of the encoder; ``ffn`` is absolute, ``kernel`` in encoder frames (40 ms)."""

    width: Annotated[int, Range(1, 65_536)] = 512  # model width E; width / heads must be even
    layers: Annotated[int, Range(1, 1024)] = 12  # Conformer blocks
    heads: Annotated[int, Range(1, 1024)] = 8  # attention heads
    ffn: Annotated[int, Range(1, 1 << 20)] = 2048  # inner width of the feed-forward modules
    # length of the depthwise convolution, in encoder frames (40 ms); odd
    kernel: Annotated[int, Range(1, 1025)] = 33
    # width of the depthwise convolution, in encoder widths
    conv_expansion: Annotated[int, Range(1, 64)] = 1
    dropout: Dropout = 0.1  # dropout after each module and in the feed-forward modules
    # dropout of attention weights; above 0 a CPU loses its fused attention
    attention_dropout: Dropout = 0.0
    mels: Annotated[int, Range(7, 1024)] = 80  # Mel bins of the features; as data.fbank.mels
    # channels of the two subsampling convolutions
    subsample_channels: Annotated[int, Range(1, 65_536)] = 32
    activation_checkpointing: bool = False  # recompute each block in the backward pass
    # with activation_checkpointing; all: the whole block, cheap: all but its matrix products
    recompute: Literal["all", "cheap"] = "all"

    def __post_init__(self) -> None:
        ranges.check(self)
        if self.width % self.heads or (self.width // self.heads) % 2:
            raise UserError(
                f"encoder width {self.width} over {self.heads} heads: choose heads so that"
                " width / heads is an even number"
            )
        if self.kernel % 2 == 0:
            raise UserError(f"encoder kernel {self.kernel}: choose an odd number of frames")

    @property
    def branches(self) -> int:
        """Residual branches of all blocks."""
        return BRANCHES * self.layers


@dataclass(frozen=True)
class _Context:
    """What every block of one forward pass shares."""

    cos_S11H: Tensor
    sin_S11H: Tensor
    bias: Tensor | None  # 0 or -inf, broadcasts to the scores [B, heads, S, S]; None: all see all
    padding_BS1: Tensor | None  # bool, True where padded; None: nothing is
    chunk: Chunk | None


class FeedForward(nn.Module):
    def __init__(self, cfg: EncoderConfig):
        super().__init__()
        self.norm = nn.LayerNorm(cfg.width)
        self.up = nn.Linear(cfg.width, cfg.ffn)
        self.down = ResidualLinear(cfg.ffn, cfg.width, cfg.branches)
        self.dropout = nn.Dropout(cfg.dropout)

    def forward(self, x_BSE: Tensor) -> Tensor:
        return self.dropout(self.down(F.silu(self.up(self.norm(x_BSE)))))


class SelfAttention(nn.Module):
    """Multi-head attention with rotary positions, through `scaled_dot_product_attention`.

    FireRedASR and Conformer add learned relative positions to the scores. Rotary positions
    (**ours**) are relative too, but live in the queries and keys: nothing is added to the scores,
    so that the fused kernels apply and the positions can restart inside a pack of utterances.
    """

    def __init__(self, cfg: EncoderConfig):
        super().__init__()
        self.heads = cfg.heads
        self.norm = nn.LayerNorm(cfg.width)
        self.qkv = nn.Linear(cfg.width, 3 * cfg.width)
        self.out = ResidualLinear(cfg.width, cfg.width, cfg.branches)
        self.dropout = nn.Dropout(cfg.dropout)
        self.attention_dropout = cfg.attention_dropout

    def forward(self, x_BSE: Tensor, context: _Context, past: LayerPast | None = None) -> Tensor:
        """With ``past``, frames attend to its keys and values too, and theirs are added to it."""
        B, S, E = x_BSE.shape
        qkv = self.qkv(self.norm(x_BSE)).view(B, S, 3, self.heads, E // self.heads)
        if past is None:
            query, key = rotate(qkv[:, :, :2], context).permute(2, 0, 3, 1, 4).unbind(0)
            value = qkv[:, :, 2].transpose(1, 2)
        else:
            past.pairs_BL2HX = pairs = torch.cat((past.pairs_BL2HX, qkv[:, :, 1:]), dim=1)
            query = rotate(qkv[:, :, :1], context).squeeze(2).transpose(1, 2)
            key = rotate(pairs[:, :, :1], context).squeeze(2).transpose(1, 2)
            value = pairs[:, :, 1].transpose(1, 2)
        dropout = self.attention_dropout if self.training else 0.0
        mixed = attend(query, key, value, context.bias, dropout)
        return self.dropout(self.out(mixed.transpose(1, 2).reshape(B, S, E)))


def rotate(x_BSNHX: Tensor, context: _Context) -> Tensor:
    """Rotary positions: the last S of the context's."""
    S = x_BSNHX.shape[1]
    cos, sin = context.cos_S11H[-S:], context.sin_S11H[-S:]
    first, second = x_BSNHX.chunk(2, dim=-1)
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return rotated.to(x_BSNHX.dtype)


class ConvModule(nn.Module):
    """Pointwise, GLU, depthwise, pointwise. LayerNorm between them (FireRedASR's choice too).

    A BatchNorm here would mix utterances, and its running statistics would drift in an encoder
    that is meant to be frozen.
    """

    def __init__(self, cfg: EncoderConfig):
        super().__init__()
        inner = cfg.width * cfg.conv_expansion
        self.norm = nn.LayerNorm(cfg.width)
        self.expand = nn.Linear(cfg.width, 2 * inner)
        self.depthwise = DepthwiseConv(inner, cfg.kernel)
        self.inner_norm = nn.LayerNorm(inner)
        self.contract = ResidualLinear(inner, cfg.width, cfg.branches)
        self.dropout = nn.Dropout(cfg.dropout)

    def forward(self, x_BSE: Tensor, context: _Context, past: LayerPast | None = None) -> Tensor:
        y = F.glu(self.expand(self.norm(x_BSE)))
        if context.padding_BS1 is not None:
            y = y.masked_fill(context.padding_BS1, 0.0)
        before = None
        if past is not None:
            before, kept = past.convolved_BHC, past.convolved_BHC.shape[1]
            past.convolved_BHC = torch.cat((before, y), 1)[:, y.shape[1] : y.shape[1] + kept]
        y = self.depthwise(y, context.chunk, before)
        return self.dropout(self.contract(F.silu(self.inner_norm(y))))


class Block(nn.Module):
    """FFN/2, attention, convolution, FFN/2, LayerNorm (Conformer, arXiv 2005.08100)."""

    def __init__(self, cfg: EncoderConfig):
        super().__init__()
        self.ffn1 = FeedForward(cfg)
        self.attention = SelfAttention(cfg)
        self.conv = ConvModule(cfg)
        self.ffn2 = FeedForward(cfg)
        self.norm = nn.LayerNorm(cfg.width)

    def forward(self, x_BSE: Tensor, context: _Context, past: LayerPast | None = None) -> Tensor:
        x = torch.add(x_BSE, self.ffn1(x_BSE), alpha=0.5)
        x = x + self.attention(x, context, past)
        x = x + self.conv(x, context, past)
        return self.norm(torch.add(x, self.ffn2(x), alpha=0.5))


class Encoder(nn.Module):
    """Log-Mel features at 100 Hz to frames at 25 Hz.

    Built under ``torch.device("meta")`` it takes no memory; `reset_parameters` fills it later.
    """

    front_end = None  # filter banks, by the recipe's data.fbank
    frame_seconds = 0.04
    takes_chunks = True
    read_past_forward = ()

    def __init__(self, cfg: EncoderConfig):
        super().__init__()
        self.cfg = cfg
        self.width, self.bins = cfg.width, cfg.mels
        self.subsampling = Subsampling(cfg.mels, cfg.subsample_channels, cfg.width)
        self.dropout = nn.Dropout(cfg.dropout)
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.layers))

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw all weights anew; the same generator state gives the same weights."""
        weight_init.reset_parameters(self, generator)

    @staticmethod
    def output_lengths(lengths_B: Tensor) -> Tensor:
        """Encoder frames of ``lengths_B`` feature frames: ceil(ceil(T / 2) / 2)."""
        return (lengths_B + 3) // 4

    def forward(
        self,
        features_BTF: Tensor,
        lengths_B: Tensor,
        chunk: Chunk | None = None,
        layers: bool = False,
    ) -> EncoderOutput:
        """Encode ``features_BTF``, of which ``lengths_B`` frames are valid and >= 1.

        Runs in the dtype of the weights. ``chunk=None`` is full context.
        """
        # On a GPU the check would wait for the queue; there the masks are always applied.
        padded = lengths_B.device.type != "cpu" or int(lengths_B.min()) < features_BTF.shape[1]
        dtype = self.subsampling.project.bias.dtype
        x = self.subsampling(features_BTF.to(dtype), lengths_B, padded)
        out_lengths_B = self.output_lengths(lengths_B)
        context = self._context(x, out_lengths_B, chunk, padded)
        x = self.dropout(x)
        outputs = []
        for block in self.blocks:
            if self.cfg.activation_checkpointing and self.training and torch.is_grad_enabled():
                x = activation_checkpointing.checkpoint(
                    block, x, context, keep=self.cfg.recompute == "cheap"
                )
            else:
                x = block(x, context)
            if layers:
                outputs.append(x)
        if context.padding_BS1 is not None:
            x = x.masked_fill(context.padding_BS1, 0.0)
        return EncoderOutput(x, out_lengths_B, tuple(outputs))

    def start_stream(self) -> EncoderStream:
        """The state of a stream before its first chunk, for `stream`."""
        cfg, bias = self.cfg, self.subsampling.project.bias
        return EncoderStream(
            features_11F=bias.new_zeros(1, 1, cfg.mels),
            halved_C1F=bias.new_zeros(cfg.subsample_channels, 1, (cfg.mels - 1) // 2),
            pairs_NL2HX=bias.new_zeros(cfg.layers, 0, 2, cfg.heads, cfg.width // cfg.heads),
            convolved_NHC=bias.new_zeros(
                cfg.layers, cfg.kernel // 2, cfg.width * cfg.conv_expansion
            ),
        )

    @torch.no_grad()
    def stream(
        self,
        features_BTF: Tensor,
        lengths_B: Tensor,
        chunk: Chunk,
        streams: Sequence[EncoderStream],
    ) -> tuple[EncoderOutput, list[EncoderStream]]:
        """The next chunk of each of several streams, which may be at different positions.

        The frames are those of `forward` with ``chunk`` over all features from the stream's first
        on. Each row has the 4 · ``chunk.size`` feature frames of a chunk, or fewer (>= 1) where the
        stream ends with it. In eval mode; returns the streams' new states. The cost of a chunk does
        not depend on its position, unless ``chunk.left`` is -1.
        """
        missing = -features_BTF.shape[1] % 4
        features = F.pad(features_BTF, (0, 0, 0, missing)).to(self.subsampling.project.bias.dtype)
        padded = missing > 0 or int(lengths_B.min()) < features.shape[1]
        past = StreamPast.gather(streams)
        x = self.subsampling(features, lengths_B, padded, past)
        lengths_B = self.output_lengths(lengths_B)
        context = self._stream_context(x, lengths_B, chunk, padded, past)
        for block, layer in zip(self.blocks, past.layers, strict=True):
            x = block(x, context, layer)
        if context.padding_BS1 is not None:
            x = x.masked_fill(context.padding_BS1, 0.0)
        kept = -1 if chunk.left < 0 else chunk.left * chunk.size
        return EncoderOutput(x, lengths_B), past.scatter(x.shape[1], kept)

    def _stream_context(
        self, x_BSE: Tensor, lengths_B: Tensor, chunk: Chunk, padded: bool, past: StreamPast
    ) -> _Context:
        """Positions count from the first cached frame: rotary positions are relative."""
        (S, device), L = (x_BSE.shape[1], x_BSE.device), past.left
        visible_BL = torch.arange(L, device=device) >= L - past.lefts_B.to(device).unsqueeze(1)
        valid_BS = valid_frames(lengths_B, S)
        bias = padding = None
        if padded or int(past.lefts_B.min()) < L:
            visible = torch.cat((visible_BL, valid_BS), 1)[:, None, None, :]
            bias = torch.zeros_like(visible, dtype=x_BSE.dtype).masked_fill(~visible, -torch.inf)
        if padded:
            padding = ~valid_BS.unsqueeze(2)
        cos, sin = self._rotations(L + S, x_BSE)
        return _Context(cos, sin, bias, padding, chunk)

    def _rotations(self, S: int, x_BSE: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines [S, 1, 1, half of a head] of the rotary positions."""
        half = self.cfg.width // self.cfg.heads // 2
        # Positions and angles in float32 at least: bf16 can't tell frame 300 from 301.
        dtype = torch.promote_types(x_BSE.dtype, torch.float32)
        steps = torch.arange(S, device=x_BSE.device)
        rates = 10000.0 ** (torch.arange(half, device=x_BSE.device, dtype=dtype) / -half)
        angles = (steps.to(dtype).unsqueeze(1) * rates).view(S, 1, 1, half)
        return angles.cos(), angles.sin()

    def _context(
        self, x_BSE: Tensor, lengths_B: Tensor, chunk: Chunk | None, padded: bool
    ) -> _Context:
        S, device = x_BSE.shape[1], x_BSE.device
        steps = torch.arange(S, device=device)
        visible = padding = None
        if padded:
            valid = valid_frames(lengths_B, S)
            padding = ~valid.unsqueeze(2)
            visible = valid[:, None, None, :]
        if chunk is not None and chunk.size < S:
            index = steps // chunk.size
            behind = index.unsqueeze(1) - index
            near = behind >= 0 if chunk.left < 0 else (behind >= 0) & (behind <= chunk.left)
            visible = near if visible is None else near & visible
            # A padded frame may have lost all keys; it sees itself rather than making a NaN.
            visible = visible | torch.eye(S, dtype=torch.bool, device=device)
        bias = None
        if visible is not None:
            bias = torch.zeros_like(visible, dtype=x_BSE.dtype).masked_fill(~visible, -torch.inf)
        return _Context(*self._rotations(S, x_BSE), bias, padding, chunk)
