"""Forced alignment: which phoneme, word and LLM token each encoder frame belongs to.

Phonemes are aligned by the CTC posteriors (torchaudio's ``forced_align``: the best path through
blank-phoneme-blank…). A CTC head spikes for a frame or two per phoneme and emits blanks in between,
so blank frames are assigned to the phonemes beside them (**ours**): up to ``reach`` frames to each
side, a shorter gap halved with the odd frame to the left; frames farther away are silence. Words
follow from the phonemes, tokens from the words by their share of characters (**ours**).

Alignments can also be read from a sample: ``{"phonemes": [[symbol, start, end], …], "words":
[[word, start, end], …]}`` in seconds; frame s is the one whose middle, (s + ½)·frame_seconds, lies
in [start, end). The names that aligners use for silence (`SILENCES`) are silence here too.
"""

from __future__ import annotations

import bisect
import itertools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from rapidfuzz.distance import Levenshtein
from torch import Tensor

from dsasr.data.text.scripts import HAN

SILENCES = frozenset(["", "sil", "sp", "spn", "<eps>", "<sil>"])  # in lower case
_WORD = re.compile(rf"[{HAN}]|[^\s{HAN}]+")


def align(
    log_probs_SP: Tensor, phonemes: Sequence[int], *, blank: int = 0, reach: int = 3
) -> Tensor:
    """Align ``phonemes`` (ids, none of them blank) with S frames of CTC log-posteriors.

    Returns for each frame the index of its phoneme in ``phonemes``, −1 in silence: int64 [S] on the
    CPU. Without phonemes all is silence. Raises ValueError if a phoneme is blank or outside the
    posteriors, if these are not numbers, or if the frames are too few for the phonemes (with one
    blank between repeats).
    """
    frames, classes = log_probs_SP.shape
    if bool(log_probs_SP.isnan().any()):
        raise ValueError("the posteriors are not numbers (NaN): the encoder or its head is broken")
    phonemes = list(phonemes)
    if any(not 0 <= p < classes or p == blank for p in phonemes):
        raise ValueError(f"phonemes must be ids below {classes} and not the blank {blank}")
    need = len(phonemes) + sum(a == b for a, b in itertools.pairwise(phonemes))
    if frames < need:
        raise ValueError(f"{frames} frames are too few for {len(phonemes)} phonemes (need {need})")
    path_S = best_path(log_probs_SP, phonemes, blank=blank)
    return torch.tensor(fill(_positions(path_S, blank), reach), dtype=torch.int64)


def best_path(log_probs_SP: Tensor, phonemes: Sequence[int], *, blank: int = 0) -> list[int]:
    """The symbol of each frame on the most probable CTC path that collapses to ``phonemes``."""
    if not phonemes:
        return [blank] * len(log_probs_SP)
    # Here and not above: torchaudio is only needed once something is aligned.
    from torchaudio.functional import forced_align

    targets = torch.tensor([list(phonemes)], dtype=torch.int64)
    log_probs = log_probs_SP.detach().float().cpu()[None].contiguous()
    path, _ = forced_align(log_probs, targets, blank=blank)
    return path[0].tolist()


def _positions(path: Sequence[int], blank: int) -> list[int]:
    """CTC path → index in the target per frame, −1 on blanks: a new symbol, or a symbol after a
    blank, starts the next index."""
    positions, position, last = [], -1, blank
    for label in path:
        if label != blank and label != last:
            position += 1
        positions.append(position if label != blank else -1)
        last = label
    return positions


def fill(positions: Sequence[int], reach: int) -> list[int]:
    """Assign gaps of −1 to the neighbors, at most ``reach`` frames to each (see the module)."""
    out = list(positions)
    start = 0
    while start < len(out):
        if out[start] != -1:
            start += 1
            continue
        end = start
        while end < len(out) and out[end] == -1:
            end += 1
        left, right = start > 0, end < len(out)
        gap = end - start
        to_left = min(reach, (gap + 1) // 2 if right else gap) if left else 0
        to_right = min(reach, gap - to_left) if right else 0
        if left:
            out[start : start + to_left] = [out[start - 1]] * to_left
        if right:
            out[end - to_right : end] = [out[end]] * to_right
        start = end
    return out


@dataclass(frozen=True)
class StoredAlignment:
    """A sample's own alignment: ``positions_S`` as of `align`, its phonemes (symbols), and if words
    are stored, these and for each phoneme the index of its word."""

    positions_S: Tensor
    phonemes: tuple[str, ...]
    words: tuple[str, ...] | None = None
    phoneme_words: list[int] | None = None


def read(alignment: dict, frames: int, frame_seconds: float) -> StoredAlignment:
    """A sample's stored alignment on ``frames`` encoder frames.

    A phoneme belongs to the word that contains its middle, or to the nearest word if none does.
    Raises ValueError for entries that are not [name, start, end] in rising order.
    """
    phones = _spans(alignment, "phonemes")
    positions = [-1] * frames
    for position, (_, start, end) in enumerate(phones):
        first = max(0, _first_frame(start, frame_seconds))
        last = min(frames, _first_frame(end, frame_seconds))
        positions[first:last] = [position] * max(0, last - first)
    positions_S = torch.tensor(positions, dtype=torch.int64)
    symbols = tuple(name for name, _, _ in phones)
    words = _spans(alignment, "words")
    if not words:
        return StoredAlignment(positions_S, symbols)
    phoneme_words = []
    for _, start, end in phones:
        middle = (start + end) / 2
        distances = [max(begin - middle, middle - stop, 0) for _, begin, stop in words]
        phoneme_words.append(distances.index(min(distances)))
    return StoredAlignment(positions_S, symbols, tuple(name for name, _, _ in words), phoneme_words)


def _first_frame(seconds: float, frame_seconds: float) -> int:
    """The first frame whose middle is not before ``seconds``. A middle that would be at it but for
    rounding, by less than a millionth of a frame, is at it."""
    return math.ceil(seconds / frame_seconds - 0.5 - 1e-6)


def _spans(alignment: dict, name: str) -> list[tuple[str, float, float]]:
    """The entries other than silence."""
    spans = []
    previous_end = 0.0
    for entry in alignment.get(name, ()):
        if not isinstance(entry, list | tuple) or len(entry) != 3:
            raise ValueError(f"alignment: {name} must be [name, start, end], not {entry!r}")
        start, end = float(entry[1]), float(entry[2])
        if not previous_end - 1e-6 <= start <= end < math.inf:
            raise ValueError(f"alignment: {name} run backwards at {entry!r}")
        previous_end = end
        if str(entry[0]).lower() not in SILENCES:
            spans.append((str(entry[0]), start, end))
    return spans


def words_of(text: str) -> list[str]:
    """The words of a text: each Han character, and each other run between spaces."""
    return _WORD.findall(text)


def words_of_phonemes(phonemes: Sequence[str], per_word: Sequence[Sequence[str]]) -> list[int]:
    """For each phoneme of the utterance the index of its word.

    ``per_word`` are the pronunciations of the single words. In running speech they may differ, so
    the two are matched by a minimal edit; a phoneme that no word has goes to the word before it.
    """
    flat_words = [word for word, symbols in enumerate(per_word) for _ in symbols]
    flat = [symbol for symbols in per_word for symbol in symbols]
    if not flat_words:
        return [-1] * len(phonemes)
    out = [-1] * len(phonemes)
    for op in Levenshtein.opcodes(list(phonemes), flat):
        for step in range(op.src_end - op.src_start):
            matched = op.tag in ("equal", "replace")
            target = op.dest_start + step if matched else op.dest_start - 1
            out[op.src_start + step] = flat_words[max(0, min(target, len(flat_words) - 1))]
    return out


def word_frames(positions_S: Tensor, phoneme_words: Sequence[int]) -> Tensor:
    """The word's index per frame [S], −1 in silence, from that per phoneme and `align`."""
    table = torch.tensor([*phoneme_words, -1], dtype=torch.int64)  # −1 indexes the last
    return table[positions_S]


def token_words(text: str, ids: Sequence[int], decode: Callable[[list[int]], str]) -> list[int]:
    """For each LLM token of ``text`` the index of its word in `words_of`.

    A token belongs to the word of its last character other than a space; a token that adds no
    character (a space, a part of a character) to the next word. ``decode`` is the tokenizer's.
    """
    ends, total = [], 0
    for word in words_of(text):
        total += len(word)
        ends.append(total)
    out, before = [], 0
    for count in range(1, len(ids) + 1):
        done = len("".join(decode(list(ids[:count])).rstrip("\ufffd").split()))
        last = done if done > before else before + 1
        out.append(min(bisect.bisect_left(ends, last), len(ends) - 1))
        before = max(before, done)
    return out


def token_frames(words_S: Tensor, token_words: Sequence[int], sizes: Sequence[int]) -> Tensor:
    """The LLM token's index per frame [S]; −1 in silence or in a word without tokens.

    A word's frames are shared among its tokens in order, by ``sizes`` (the characters of each
    token, counted as at least 1). ``token_words`` as of the function of that name.
    """
    out = torch.full_like(words_S, -1)
    for word in sorted({w for w in words_S.tolist() if w >= 0}):
        tokens = [token for token, of_word in enumerate(token_words) if of_word == word]
        if not tokens:
            continue
        frames = (words_S == word).nonzero()[:, 0]
        share = torch.tensor([max(1, sizes[token]) for token in tokens], dtype=torch.float64)
        edges = share.cumsum(0) / share.sum()
        middle = (torch.arange(len(frames), dtype=torch.float64) + 0.5) / len(frames)
        picks = torch.searchsorted(edges, middle).clamp(max=len(tokens) - 1)
        out[frames] = torch.tensor(tokens)[picks]
    return out
