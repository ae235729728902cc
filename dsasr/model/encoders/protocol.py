"""What the rest of the package needs of an encoder, the Conformer or a pretrained one."""

from __future__ import annotations

from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from dsasr.data.audio.frontends import PretrainedFrontEnd
from dsasr.model.dynamic_chunks import Chunk


class EncoderOutput(NamedTuple):
    """``frames_BSE`` (zero where padded), their ``lengths_B``, each block's output if asked for.

    A tuple, because ZeRO-3 looks for tensors in tuples only when it hooks a module's output.
    """

    frames_BSE: Tensor
    lengths_B: Tensor
    layers: tuple[Tensor, ...] = ()


@runtime_checkable
class Encoder(Protocol):
    """Features [B, T, F] to frames [B, S, E]; an utterance's frames do not depend on its batch."""

    # None: filter banks with CMVN, as the recipe's data.fbank says
    front_end: PretrainedFrontEnd | None
    width: int  # E
    bins: int  # F
    frame_seconds: float  # of audio between two encoder frames
    takes_chunks: bool  # whether `chunk` may be given: dynamic chunks in training, streaming
    # last parts of the names of linear layers in the blocks whose weights are read past their
    # forward: LoRA would have no effect on them
    read_past_forward: tuple[str, ...]

    @property
    def blocks(self) -> nn.ModuleList: ...

    def output_lengths(self, lengths_B: Tensor) -> Tensor:
        """Encoder frames S of utterances of ``lengths_B`` feature frames T."""

    def __call__(
        self,
        features_BTF: Tensor,
        lengths_B: Tensor,
        chunk: Chunk | None = None,
        layers: bool = False,
    ) -> EncoderOutput: ...


def silence_shape(encoder: Encoder) -> tuple[int, int]:
    """[T, F] of a short silence that gives the encoder a frame: the input where no speech is."""
    front_end = encoder.front_end
    shortest = 1 if front_end is None else front_end.frames(front_end.window)
    return max(shortest, 16), encoder.bins


def stacked_frames(encoder: Encoder) -> int:
    """Spectral frames side by side in a row of the features that ``encoder`` reads."""
    return 1 if encoder.front_end is None else encoder.front_end.stack


def valid_frames(lengths_B: Tensor, frames: int) -> Tensor:
    """Bool [B, frames], True where an utterance has a frame."""
    return torch.arange(frames, device=lengths_B.device) < lengths_B.unsqueeze(1)
