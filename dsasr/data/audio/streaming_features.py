"""Filter banks of audio that comes in pieces."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from dsasr.data.audio.features import fbank
from dsasr.data.audio.frontends import FbankFrontEnd


class StreamingFbank:
    """The features of `FbankFrontEnd`, frame by frame as their audio comes.

    A frame depends on its own window of samples and on nothing else, so all frames together are
    those of the whole audio. Dither, which is drawn from the whole audio, is left out.
    """

    def __init__(self, front_end: FbankFrontEnd):
        self._config = replace(front_end.config, dither=0.0)
        self._cmvn = front_end.cmvn
        self._rest = torch.zeros(0)  # samples from the next frame's first on

    def feed(self, wave: Tensor) -> Tensor:
        """The frames [n, F] that end within ``wave`` [samples], float32 in [-1, 1]; n may be 0."""
        self._rest = torch.cat((self._rest, wave))
        frames = fbank(self._rest, self._config)
        self._rest = self._rest[len(frames) * self._config.shift :]
        return frames if self._cmvn is None else self._cmvn.apply_(frames)
