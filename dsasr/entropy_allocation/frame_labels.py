"""Which phoneme and which word each frame of a probe set belongs to, the same for every encoder.

Labels lie on one grid of frames, the aligner's. Features of an encoder with another frame rate are
brought to that grid: a cell takes the mean of the frames whose middle lies in it, or the nearest
frame if there is none (ours). So encoders are compared on the same frames, labels and speakers.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dsasr.data.text.phonemes import MissingPhonemes, Phonemizer, UnknownWord
from dsasr.entropy_allocation import forced_alignment
from dsasr.entropy_allocation.forced_alignment import Alignment
from dsasr.entropy_allocation.frame_set import FrameSet, FrameSetBuilder
from dsasr.utils.errors import UserError


class Numbering:
    """Numbers for words, in the order of their first use."""

    def __init__(self) -> None:
        self.ids: dict[str, int] = {}

    def __call__(self, word: str) -> int:
        return self.ids.setdefault(word, len(self.ids))


@dataclass(frozen=True)
class Labeled:
    """One utterance's labels: ``positions_S`` the place in ``phonemes`` (−1 silence) and
    ``words_S`` the word's number (−1 none) of each of S cells of ``frame_seconds``."""

    key: str
    speaker: str
    phonemes: tuple[int, ...]
    positions_S: Tensor
    words_S: Tensor
    frame_seconds: float


def word_owners(
    symbols: Sequence[str], text: str, lang: str, phonemizer: Phonemizer | None
) -> list[int]:
    """For each phoneme the index of its word, by the words' own pronunciations.

    Where the phonemizer cannot say them (stored phonemes, an unknown word, no espeak-ng), phonemes
    are shared among the words by their number of characters.
    """
    words = forced_alignment.words_of(text)
    if phonemizer is not None:
        try:
            return forced_alignment.word_of_phonemes(
                symbols, [phonemizer.phonemes(w, lang) for w in words]
            )
        except (MissingPhonemes, UnknownWord, UserError):
            pass
    if not words:
        return [-1] * len(symbols)
    ends = list(itertools.accumulate(map(len, words)))
    places = ((i + 0.5) / len(symbols) * ends[-1] for i in range(len(symbols)))
    return [min(bisect.bisect_right(ends, place), len(words) - 1) for place in places]


def label(
    key: str,
    speaker: str,
    words: Sequence[str],
    phonemes: Sequence[int],
    owners: Sequence[int],
    placed: Alignment,
    number: Numbering,
    frame_seconds: float,
) -> Labeled:
    """Labels of one utterance whose phonemes are ``placed``; ``owners`` are indices into ``words``,
    which are told apart by spelling."""
    table = torch.tensor([*(number(word.lower()) for word in words), -1], dtype=torch.int64)
    words_S = table[forced_alignment.word_frames(placed, owners)]
    return Labeled(key, speaker, tuple(phonemes), placed.positions_S, words_S, frame_seconds)


def label_tokens(held: Labeled, text: str, owners: Sequence[int], ids: Sequence[int], decode):
    """The same utterance with its LLM tokens in the place of words; ``decode`` is the tokenizer's.

    A token's share of its word's frames goes by its characters.
    """
    placed = Alignment(torch.empty(0), held.positions_S, 0.0)
    words_S = forced_alignment.word_frames(placed, owners)
    sizes = [len(decode([i]).strip()) for i in ids]
    places_S = forced_alignment.token_frames(
        words_S, forced_alignment.token_words(text, ids, decode), sizes
    )
    table = torch.tensor([*ids, -1], dtype=torch.int64)
    return Labeled(
        held.key, held.speaker, held.phonemes, held.positions_S, table[places_S], held.frame_seconds
    )


def to_grid(x_SE: Tensor, frame_seconds: float, cells: int, cell_seconds: float) -> Tensor:
    """Features [S, E] of frames of ``frame_seconds`` on ``cells`` cells: [cells, E]."""
    if abs(frame_seconds - cell_seconds) < 1e-6 and len(x_SE) == cells:
        return x_SE
    if not len(x_SE):
        raise ValueError("an utterance without frames has no features to place")
    middles_S = (torch.arange(len(x_SE)) + 0.5) * frame_seconds
    cell_S = (middles_S / cell_seconds).long()
    inside = cell_S < cells
    sums = torch.zeros(cells, x_SE.shape[1], dtype=x_SE.dtype)
    sums.index_add_(0, cell_S[inside], x_SE[inside])
    counts = torch.bincount(cell_S[inside], minlength=cells)
    middle_cells = (torch.arange(cells) + 0.5) * cell_seconds
    nearest = (middle_cells / frame_seconds).long().clamp(max=len(x_SE) - 1)
    return torch.where(counts[:, None] > 0, sums / counts.clamp(min=1)[:, None], x_SE[nearest])


def frame_set(
    labels: Iterable[Labeled],
    features: Mapping[str, Tensor],
    frame_seconds: float,
    window: int = 2,
) -> FrameSet:
    """The labeled frames of an encoder. ``features``: key → [S, E] on the CPU."""
    builder = FrameSetBuilder(window)
    for held in labels:
        cells = len(held.positions_S)
        x = to_grid(features[held.key].float(), frame_seconds, cells, held.frame_seconds)
        builder.add(x, held.positions_S, held.phonemes, held.words_S, held.speaker)
    return builder.build()
