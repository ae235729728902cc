"""The caches of an encoder that runs chunk by chunk: one stream's, and those of a batch of streams.

A stream's state is a value: a step makes a new one and changes none, so that streams can be batched
in any company and no stream sees another's past.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class EncoderStream(NamedTuple):
    """What an encoder's next chunk needs of those before it.

    ``features_11F`` and ``halved_C1F``: the last frame of the features, and of them at half the
    rate, zeros at the start. ``pairs_NL2HX``: each of N layers' keys and values, before rotation,
    of the L visible frames. ``convolved_NHC``: the inputs of each layer's depthwise convolution, of
    the H frames that it looks back.
    """

    features_11F: Tensor
    halved_C1F: Tensor
    pairs_NL2HX: Tensor
    convolved_NHC: Tensor

    @property
    def bytes(self) -> int:
        """Memory of the state."""
        return sum(x.numel() * x.element_size() for x in self)


@dataclass
class LayerPast:
    """One layer's caches, of a batch of streams; the layer brings them up to date."""

    pairs_BL2HX: Tensor
    convolved_BHC: Tensor


@dataclass
class StreamPast:
    """The caches of a batch of streams. ``lefts_B`` (on the CPU) of the ``left`` cached frames are
    a stream's own, the last ones."""

    features_B11F: Tensor
    halved_BC1F: Tensor
    layers: list[LayerPast]
    lefts_B: Tensor
    left: int

    @classmethod
    def gather(cls, streams: Sequence[EncoderStream]) -> StreamPast:
        lefts = [stream.pairs_NL2HX.shape[1] for stream in streams]
        left = max(lefts)
        pairs_BNL2HX = torch.stack(
            [
                F.pad(stream.pairs_NL2HX, (0, 0) * 3 + (left - own, 0))
                for stream, own in zip(streams, lefts, strict=True)
            ]
        )
        convolved_BNHC = torch.stack([stream.convolved_NHC for stream in streams])
        return cls(
            torch.stack([stream.features_11F for stream in streams]),
            torch.stack([stream.halved_C1F for stream in streams]),
            [
                LayerPast(*pair)
                for pair in zip(pairs_BNL2HX.unbind(1), convolved_BNHC.unbind(1), strict=True)
            ],
            torch.tensor(lefts),
            left,
        )

    def scatter(self, frames: int, kept: int) -> list[EncoderStream]:
        """The streams' states after a chunk of ``frames``; ``kept`` frames stay visible, -1: all.

        Of a stream that ended within the chunk, the state has no use.
        """
        pairs_BNL2HX = torch.stack([layer.pairs_BL2HX for layer in self.layers], 1)
        convolved_BNHC = torch.stack([layer.convolved_BHC for layer in self.layers], 1)
        streams = []
        for row, own in enumerate(self.lefts_B.tolist()):
            visible = own + frames if kept < 0 else min(own + frames, kept)
            first = pairs_BNL2HX.shape[2] - visible
            # Clones: a view would keep the whole batch alive.
            streams.append(
                EncoderStream(
                    self.features_B11F[row].clone(),
                    self.halved_BC1F[row].clone(),
                    pairs_BNL2HX[row, :, first:].clone(),
                    convolved_BNHC[row].clone(),
                )
            )
        return streams
