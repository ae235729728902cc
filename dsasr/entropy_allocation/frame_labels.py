"""Frame labels: the phoneme and the word of each frame of a probe set, the same for every encoder.

Labels are on one grid of frames, the aligner's. Features of an encoder with another frame rate are
resampled to that grid: a cell takes the mean of the frames whose middle lies in it, or the nearest
frame if there is none (**ours**). So encoders are compared on the same frames, labels and speakers.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dsasr.data.text.espeak_phonemizer import EspeakPhonemizer
from dsasr.data.text.normalization import is_upper_case
from dsasr.data.text.phoneme_vocab import PhonemeVocab
from dsasr.data.text.phonemizer import MissingPhonemes, Phonemizer, StoredPhonemes, UnknownWord
from dsasr.entropy_allocation import forced_alignment
from dsasr.entropy_allocation.frame_set import FrameSet, FrameSetBuilder
from dsasr.utils.errors import UserError


@dataclass(frozen=True)
class AlignedUtterance:
    """An utterance with its phonemes (ids) on S frames, before its words are numbered.

    ``positions_S`` is each frame's index into ``phonemes`` (−1 in silence), ``phoneme_words`` each
    phoneme's index into ``words`` (−1 none).
    """

    key: str
    speaker: str
    phonemes: tuple[int, ...]
    positions_S: Tensor
    words: tuple[str, ...]
    phoneme_words: tuple[int, ...]


@dataclass(frozen=True)
class UtteranceLabels:
    """One utterance's labels: ``positions_S`` the index into ``phonemes`` (−1 in silence) and
    ``words_S`` the id of the word or LLM token (−1 none) of each of S cells of ``frame_seconds``.
    """

    key: str
    speaker: str
    phonemes: tuple[int, ...]
    positions_S: Tensor
    words_S: Tensor
    frame_seconds: float

    def to_json(self) -> dict[str, Any]:
        tensors = {"positions_S": self.positions_S.tolist(), "words_S": self.words_S.tolist()}
        return asdict(self) | tensors

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> UtteranceLabels:
        tensors = {k: torch.tensor(row[k], dtype=torch.int64) for k in ("positions_S", "words_S")}
        return cls(**{**row, **tensors, "phonemes": tuple(row["phonemes"])})


def word_phonemizer(phonemizer: Phonemizer) -> Phonemizer:
    """The phonemizer of single words: ``phonemizer``, or espeak-ng where phonemes are stored."""
    return EspeakPhonemizer() if isinstance(phonemizer, StoredPhonemes) else phonemizer


def align_utterance(
    key: str,
    speaker: str,
    text: str,
    lang: str,
    phonemes: Sequence[int],
    log_probs_SP: Tensor,
    vocab: PhonemeVocab,
    phonemizer: Phonemizer | None,
) -> AlignedUtterance:
    """An utterance aligned by CTC log-posteriors; ``phonemizer`` is a `word_phonemizer`.

    Raises ValueError where the frames are too few for the phonemes, or the posteriors are NaN.
    """
    positions_S = forced_alignment.align(log_probs_SP, phonemes)
    phoneme_words = assign_words(vocab.decode(phonemes), text, lang, phonemizer)
    words = tuple(forced_alignment.words_of(text))
    return AlignedUtterance(key, speaker, tuple(phonemes), positions_S, words, tuple(phoneme_words))


def assign_words(
    symbols: Sequence[str], text: str, lang: str, phonemizer: Phonemizer | None
) -> list[int]:
    """For each phoneme the index of its word in ``text``, by the pronunciations of single words.

    Where the phonemizer cannot give them (stored phonemes, an unknown word, no espeak-ng), phonemes
    are shared among the words by their number of characters.
    """
    words = forced_alignment.words_of(text)
    # A word alone does not show whether the utterance is in upper case.
    spoken = [word.lower() for word in words] if is_upper_case(text) else words
    if phonemizer is not None:
        try:
            return forced_alignment.words_of_phonemes(
                symbols, [phonemizer.phonemes(w, lang) for w in spoken]
            )
        except (MissingPhonemes, UnknownWord, UserError):
            pass
    if not words:
        return [-1] * len(symbols)
    ends = list(itertools.accumulate(map(len, words)))
    middles = ((i + 0.5) / len(symbols) * ends[-1] for i in range(len(symbols)))
    return [min(bisect.bisect_right(ends, middle), len(words) - 1) for middle in middles]


def number_words(
    utterances: Iterable[AlignedUtterance], frame_seconds: float
) -> list[UtteranceLabels]:
    """Labels of utterances on frames of ``frame_seconds``.

    Words are numbered in the order of their first use; those of one spelling, whatever its case,
    are one word.
    """
    ids: dict[str, int] = {}
    labels = []
    for u in utterances:
        numbers = [ids.setdefault(word.lower(), len(ids)) for word in u.words]
        table = torch.tensor([*numbers, -1], dtype=torch.int64)
        words_S = table[forced_alignment.word_frames(u.positions_S, u.phoneme_words)]
        labels.append(
            UtteranceLabels(u.key, u.speaker, u.phonemes, u.positions_S, words_S, frame_seconds)
        )
    return labels


def label_tokens(
    labels: UtteranceLabels,
    text: str,
    phoneme_words: Sequence[int],
    ids: Sequence[int],
    decode: Callable[[Sequence[int]], str],
) -> UtteranceLabels:
    """The same utterance labeled with its LLM tokens instead of words.

    ``ids`` are the tokens of ``text`` and ``decode`` is the tokenizer's. A word's frames are shared
    among its tokens by their characters.
    """
    words_S = forced_alignment.word_frames(labels.positions_S, phoneme_words)
    sizes = [len(decode([i]).strip()) for i in ids]
    tokens_S = forced_alignment.token_frames(
        words_S, forced_alignment.token_words(text, ids, decode), sizes
    )
    table = torch.tensor([*ids, -1], dtype=torch.int64)
    return replace(labels, words_S=table[tokens_S])


def to_grid(x_SE: Tensor, frame_seconds: float, cells: int, cell_seconds: float) -> Tensor:
    """Features [S, E] of frames of ``frame_seconds`` resampled to ``cells`` cells: [cells, E]."""
    if abs(frame_seconds - cell_seconds) < 1e-6 and len(x_SE) == cells:
        return x_SE
    if not len(x_SE):
        raise ValueError("an utterance without frames has no features to resample")
    # float64 and a millionth of a cell: a middle on an edge is in the cell that begins there.
    middles_S = (torch.arange(len(x_SE), dtype=torch.float64) + 0.5) * frame_seconds
    cell_S = (middles_S / cell_seconds + 1e-6).long()
    inside = cell_S < cells
    sums = torch.zeros(cells, x_SE.shape[1], dtype=x_SE.dtype)
    sums.index_add_(0, cell_S[inside], x_SE[inside])
    counts = torch.bincount(cell_S[inside], minlength=cells)
    middle_cells = (torch.arange(cells, dtype=torch.float64) + 0.5) * cell_seconds
    nearest = (middle_cells / frame_seconds + 1e-6).long().clamp(max=len(x_SE) - 1)
    return torch.where(counts[:, None] > 0, sums / counts.clamp(min=1)[:, None], x_SE[nearest])


def frame_set(
    labels: Iterable[UtteranceLabels],
    features: Mapping[str, Tensor],
    frame_seconds: float,
    window: int = 2,
) -> FrameSet:
    """The labeled frames of an encoder; ``features``: key → [S, E] on the CPU."""
    builder = FrameSetBuilder(window)
    for u in labels:
        x = to_grid(features[u.key].float(), frame_seconds, len(u.positions_S), u.frame_seconds)
        builder.add(x, u.positions_S, u.phonemes, u.words_S, u.speaker)
    return builder.build()
