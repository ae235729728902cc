"""Labeled frames of a probe set: the input of `pai_csai`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class FrameSet:
    """Labeled frames of a probe set, on one device.

    x_NE float; phoneme_N int64 ids; window_NK int64, column K//2 being the frame's own phoneme;
    word_N int64 ids of words or LLM tokens; utterance_N int64 into ``speakers``.
    """

    x_NE: Tensor
    phoneme_N: Tensor
    window_NK: Tensor
    word_N: Tensor
    utterance_N: Tensor
    speakers: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.phoneme_N)

    def to(self, device: torch.device | str) -> FrameSet:
        columns = (self.x_NE, self.phoneme_N, self.window_NK, self.word_N, self.utterance_N)
        return FrameSet(*(column.to(device) for column in columns), self.speakers)

    def with_features(self, x_NE: Tensor) -> FrameSet:
        """The same labels with features of another encoder. Raises ValueError on other N."""
        if len(x_NE) != len(self):
            raise ValueError(f"{len(x_NE)} frames of features for {len(self)} labeled frames")
        rest = (self.phoneme_N, self.window_NK, self.word_N, self.utterance_N, self.speakers)
        return FrameSet(x_NE, *rest)


class FrameSetBuilder:
    """Collects utterances into a `FrameSet`; frames in silence are left out (they have no P)."""

    def __init__(self, window: int = 2) -> None:
        self.window = window
        self.parts: list[tuple[Tensor, ...]] = []
        self.speakers: list[str] = []

    def add(
        self,
        x_SE: Tensor,
        positions_S: Tensor,
        phonemes: Sequence[int],
        words_S: Tensor,
        speaker: str,
    ) -> None:
        """Add an utterance: frames, the index of each in ``phonemes`` (−1: silence), its word id.

        Frames without a word (−1) are left out as well. Raises ValueError on other lengths.
        """
        if not len(x_SE) == len(positions_S) == len(words_S):
            raise ValueError(
                f"{len(x_SE)} frames, {len(positions_S)} positions, {len(words_S)} words"
            )
        keep = (positions_S >= 0) & (words_S >= 0)
        window_SK = phoneme_window(positions_S[keep], phonemes, self.window)
        utterance = torch.full((int(keep.sum()),), len(self.speakers), dtype=torch.int64)
        phoneme_S = window_SK[:, self.window]
        x = x_SE.detach()[keep.to(x_SE.device)]
        self.parts.append((x, phoneme_S, window_SK, words_S[keep], utterance))
        self.speakers.append(speaker)

    def build(self) -> FrameSet:
        """All utterances added, on the features' device. Raises ValueError without any."""
        if not self.parts:
            raise ValueError("no utterance was added")
        columns = [torch.cat(column) for column in zip(*self.parts, strict=True)]
        device = columns[0].device
        return FrameSet(*(column.to(device) for column in columns), tuple(self.speakers))


def phoneme_window(positions_N: Tensor, phonemes: Sequence[int], window: int) -> Tensor:
    """Phoneme ids [N, 2·window + 1] around each position; 0 (the blank's id) beyond either end."""
    padded = torch.tensor([0] * window + list(phonemes) + [0] * window, dtype=torch.int64)
    offsets_K = torch.arange(2 * window + 1)
    return padded[positions_N.cpu()[:, None] + offsets_K]
