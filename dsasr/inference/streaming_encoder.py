"""Encoders of utterances that are still being spoken.

Of our Conformer each chunk is encoded once, from caches, and the cost of a chunk stays the same. A
pretrained encoder sees whole utterances only: at each chunk the utterance so far is
encoded again, and the cost of a chunk grows with the utterance, up to the recognizer's longest.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dsasr.data.audio.frontends import FbankFrontEnd, FrontEnd
from dsasr.data.audio.resampling import RATE
from dsasr.data.audio.streaming_features import StreamingFbank
from dsasr.model.dynamic_chunks import Chunk
from dsasr.model.speech_llm import SpeechLLM

SUBSAMPLING = 4  # feature frames of an encoder frame
SHORTEST = int(0.2 * RATE)  # samples: the encoder's subsampling needs some frames


class UtteranceAudio(Protocol):
    """An utterance's audio so far, and the encoder's frames of what was encoded of it."""

    settles: bool  # whether frames stay as they are when more audio comes
    frames_SE: Tensor | None

    def add(self, wave: Tensor) -> None:
        """More audio [n]."""

    def end(self) -> None:
        """There is no more audio."""

    @property
    def ready(self) -> bool:
        """Whether there is a whole chunk to encode, or the rest of an utterance that ended."""


class _ChunkedAudio:
    settles = True

    def __init__(self, front_end: FbankFrontEnd, size: int, state):
        self._fbank, self._size = StreamingFbank(front_end), size
        self._features_TF = torch.zeros(0, front_end.bins)
        self._samples, self._ended = 0, False
        self.state, self.frames_SE = state, None

    def add(self, wave: Tensor) -> None:
        self._samples += len(wave)
        self._features_TF = torch.cat((self._features_TF, self._fbank.feed(wave)))

    def end(self) -> None:
        if self._samples < SHORTEST:
            self.add(torch.zeros(SHORTEST - self._samples))
        self._ended = True

    @property
    def ready(self) -> bool:
        waiting = len(self._features_TF)
        return waiting >= self._size or (self._ended and waiting > 0)

    @property
    def chunk_TF(self) -> Tensor:
        """The next chunk's features; they stay until `store`."""
        return self._features_TF[: self._size]

    def store(self, frames_SE: Tensor, state) -> None:
        """Add the chunk's frames, and drop its features."""
        self._features_TF = self._features_TF[self._size :]
        before = () if self.frames_SE is None else (self.frames_SE,)
        self.frames_SE, self.state = torch.cat((*before, frames_SE)), state


class ChunkedEncoder:
    """Runs a Conformer chunk by chunk, over several utterances at once."""

    def __init__(self, model: SpeechLLM, front_end: FbankFrontEnd, chunk: Chunk):
        self._encoder, self._front_end, self._chunk = model.encoder, front_end, chunk

    def begin(self) -> _ChunkedAudio:
        size = SUBSAMPLING * self._chunk.size
        return _ChunkedAudio(self._front_end, size, self._encoder.start_stream())

    def encode(self, utterances: Sequence[_ChunkedAudio]) -> None:
        """The next chunk of each utterance that is ``ready``."""
        device = utterances[0].state.features_11F.device
        parts = [audio.chunk_TF for audio in utterances]
        output, states = self._encoder.stream(
            pad_sequence(parts, batch_first=True).to(device),
            torch.tensor([len(part) for part in parts], device=device),
            self._chunk,
            [audio.state for audio in utterances],
        )
        rows = zip(utterances, output.frames_BSE, output.lengths_B.tolist(), states, strict=True)
        for audio, frames_SE, length, state in rows:
            audio.store(frames_SE[:length], state)


class _WholeAudio:
    settles = False

    def __init__(self, chunk_samples: int):
        self._chunk_samples = chunk_samples
        self.wave, self.frames_SE = torch.zeros(0), None
        self._encoded, self._ended = 0, False  # samples encoded; whether there is no more

    def add(self, wave: Tensor) -> None:
        self.wave = torch.cat((self.wave, wave))

    def end(self) -> None:
        self.add(torch.zeros(max(SHORTEST - len(self.wave), 0)))
        self._ended = True

    @property
    def ready(self) -> bool:
        waiting = len(self.wave) - self._encoded
        return waiting >= self._chunk_samples or (self._ended and waiting > 0)

    def store(self, frames_SE: Tensor) -> None:
        """Replace the frames by those of all audio so far."""
        self.frames_SE, self._encoded = frames_SE, len(self.wave)


class WholeEncoder:
    """Encodes utterances anew at each chunk, all of their audio so far."""

    def __init__(self, model: SpeechLLM, front_end: FrontEnd, chunk_seconds: float):
        self._model, self._front_end = model, front_end
        self._chunk_samples = max(round(chunk_seconds * RATE), SHORTEST)

    def begin(self) -> _WholeAudio:
        return _WholeAudio(self._chunk_samples)

    @torch.no_grad()
    def encode(self, utterances: Sequence[_WholeAudio]) -> None:
        """The audio so far of each utterance that is ``ready``."""
        device = self._model.llm.device
        rows = [self._front_end.features(audio.wave) for audio in utterances]
        lengths_B = torch.tensor([len(row) for row in rows], device=device)
        output = self._model.encoder(pad_sequence(rows, batch_first=True).to(device), lengths_B)
        frames = zip(utterances, output.frames_BSE, output.lengths_B.tolist(), strict=True)
        for audio, frames_SE, length in frames:
            audio.store(frames_SE[:length])
