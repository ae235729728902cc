"""Which phoneme, word and LLM token each encoder frame belongs to.

Phonemes are placed by CTC forced alignment (torchaudio's ``forced_align``: the best path through
blank-phoneme-blank… of the log-posteriors). A CTC head fires for a frame or two per phoneme and
says blank in between, so blank frames are given to the phonemes beside them (ours): up to ``reach``
frames to each side, a shorter gap halved with the odd frame to the left; what is farther away is
silence. Words follow from the phonemes, tokens from the words by their share of characters (ours).

Alignments can also be read from a sample: ``{"phonemes": [[symbol, start, end], …], "words":
[[word, start, end], …]}`` in seconds; frame s is the one whose middle, (s + ½)·frame_seconds, lies
in [start, end). The names that aligners give to silence (`SILENCES`) are silence here too.
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


@dataclass(frozen=True)
class Alignment:
    """Per encoder frame: ``labels_S`` the phoneme's id (``blank`` in silence) and ``positions_S``
    its place in the phoneme sequence (−1 in silence), int64 on the CPU.

    ``score`` is the mean log-posterior per frame of the path, in nats (0 for a stored alignment).
    """

    labels_S: Tensor
    positions_S: Tensor
    score: float


def align(
    log_probs_SP: Tensor, phonemes: Sequence[int], *, blank: int = 0, reach: int = 3
) -> Alignment:
    """Place ``phonemes`` (ids, none of them blank) on S frames of CTC log-posteriors.

    An empty sequence gives silence. Raises ValueError if a phoneme is blank or outside the
    posteriors, or if the frames are too few for the phonemes (with one blank between repeats).
    """
    frames, classes = log_probs_SP.shape
    phonemes = list(phonemes)
    if any(not 0 <= p < classes or p == blank for p in phonemes):
        raise ValueError(f"phonemes must be ids below {classes} and not the blank {blank}")
    need = len(phonemes) + sum(a == b for a, b in itertools.pairwise(phonemes))
    if frames < need:
        raise ValueError(f"{frames} frames are too few for {len(phonemes)} phonemes (need {need})")
    log_probs_SP = log_probs_SP.detach().float().cpu()
    if not phonemes:
        score = float(log_probs_SP[:, blank].mean()) if frames else 0.0
        return _silence(frames, blank, score)
    # Here and not above: torchaudio is only needed once something is aligned.
    from torchaudio.functional import forced_align

    targets = torch.tensor([phonemes], dtype=torch.int64)
    path, scores = forced_align(log_probs_SP[None].contiguous(), targets, blank=blank)
    positions = fill(_positions(path[0].tolist(), blank), reach)
    labels = [phonemes[p] if p >= 0 else blank for p in positions]
    return Alignment(torch.tensor(labels), torch.tensor(positions), float(scores.mean()))


def _positions(path: Sequence[int], blank: int) -> list[int]:
    """CTC path → place in the target per frame, −1 on blanks: a new symbol or a blank before it
    starts the next place."""
    positions, place, last = [], -1, blank
    for label in path:
        if label != blank and label != last:
            place += 1
        positions.append(place if label != blank else -1)
        last = label
    return positions


def fill(positions: Sequence[int], reach: int) -> list[int]:
    """Give gaps of −1 to the neighbors, ``reach`` frames at most to each (see the module)."""
    out = list(positions)
    at = 0
    while at < len(out):
        if out[at] != -1:
            at += 1
            continue
        end = at
        while end < len(out) and out[end] == -1:
            end += 1
        left, right = at > 0, end < len(out)
        gap = end - at
        to_left = min(reach, (gap + 1) // 2 if right else gap) if left else 0
        to_right = min(reach, gap - to_left) if right else 0
        if left:
            out[at : at + to_left] = [out[at - 1]] * to_left
        if right:
            out[end - to_right : end] = [out[end]] * to_right
        at = end
    return out


@dataclass(frozen=True)
class Stored:
    """A sample's own alignment: its phonemes (symbols), and if words are stored, these and the
    index of each phoneme's word among them."""

    placed: Alignment
    phonemes: tuple[str, ...]
    words: tuple[str, ...] | None = None
    owners: list[int] | None = None


def read(
    stored: dict,
    encode: Callable[[list[str]], list[int]],
    frames: int,
    frame_seconds: float,
    *,
    blank: int = 0,
) -> Stored:
    """A sample's stored alignment on ``frames`` encoder frames.

    ``encode`` maps symbols to ids (`PhonemeVocab.encode`; its error for unknown symbols passes).
    A phoneme belongs to the word that holds its middle (the nearest one, if none does). Raises
    ValueError for entries that are not [name, start, end] in rising order.
    """
    phones = _spans(stored, "phonemes")
    symbols = tuple(name for name, _, _ in phones)
    ids = encode(list(symbols))
    positions = [-1] * frames
    for place, (_, start, end) in enumerate(phones):
        first = max(0, math.ceil(start / frame_seconds - 0.5))
        last = min(frames, math.ceil(end / frame_seconds - 0.5))
        positions[first:last] = [place] * max(0, last - first)
    labels = [ids[p] if p >= 0 else blank for p in positions]
    placed = Alignment(
        torch.tensor(labels, dtype=torch.int64), torch.tensor(positions, dtype=torch.int64), 0.0
    )
    words = _spans(stored, "words")
    if not words:
        return Stored(placed, symbols)
    owners = []
    for _, start, end in phones:
        middle = (start + end) / 2
        away = [max(begin - middle, middle - stop, 0) for _, begin, stop in words]
        owners.append(away.index(min(away)))
    return Stored(placed, symbols, tuple(name for name, _, _ in words), owners)


def _spans(stored: dict, name: str) -> list[tuple[str, float, float]]:
    """Entries other than silence."""
    spans = []
    clock = 0.0
    for entry in stored.get(name, ()):
        if not isinstance(entry, list | tuple) or len(entry) != 3:
            raise ValueError(f"alignment: {name} must be [name, start, end], not {entry!r}")
        start, end = float(entry[1]), float(entry[2])
        if not clock - 1e-6 <= start <= end:
            raise ValueError(f"alignment: {name} run backwards at {entry!r}")
        clock = end
        if str(entry[0]).lower() not in SILENCES:
            spans.append((str(entry[0]), start, end))
    return spans


def words_of(text: str) -> list[str]:
    """The words that spans are derived for: each Han character, and each run between spaces."""
    return _WORD.findall(text)


def word_of_phonemes(phonemes: Sequence[str], per_word: Sequence[Sequence[str]]) -> list[int]:
    """For each phoneme of the utterance the index of its word.

    ``per_word`` are the words' own pronunciations. In running speech they may differ, so that the
    two are matched by a minimal edit; a phoneme that no word has goes to the word before it.
    """
    owners = [word for word, symbols in enumerate(per_word) for _ in symbols]
    flat = [symbol for symbols in per_word for symbol in symbols]
    if not owners:
        return [-1] * len(phonemes)
    out = [-1] * len(phonemes)
    for op in Levenshtein.opcodes(list(phonemes), flat):
        for step in range(op.src_end - op.src_start):
            at = op.dest_start + step if op.tag in ("equal", "replace") else op.dest_start - 1
            out[op.src_start + step] = owners[max(0, min(at, len(owners) - 1))]
    return out


def word_frames(alignment: Alignment, owners: Sequence[int]) -> Tensor:
    """The word's index per frame [S] from that per phoneme; −1 in silence."""
    table = torch.tensor([*owners, -1], dtype=torch.int64)  # −1 looks up the last
    return table[alignment.positions_S]


def token_words(text: str, ids: Sequence[int], decode: Callable[[list[int]], str]) -> list[int]:
    """For each LLM token of ``text`` the index of its word in `words_of`.

    A token belongs to the word that holds its last character other than a space; one that adds no
    character (a space, a part of one) to the word that comes next. ``decode`` is the tokenizer's.
    """
    ends, total = [], 0
    for word in words_of(text):
        total += len(word)
        ends.append(total)
    out, before = [], 0
    for count in range(1, len(ids) + 1):
        done = len("".join(decode(list(ids[:count])).rstrip("\ufffd").split()))
        place = done if done > before else before + 1
        out.append(min(bisect.bisect_left(ends, place), len(ends) - 1))
        before = max(before, done)
    return out


def token_frames(words_S: Tensor, owners: Sequence[int], sizes: Sequence[int]) -> Tensor:
    """The LLM token's index per frame [S]; −1 in silence or in a word without tokens.

    A word's frames are shared among its tokens in order, by ``sizes`` (characters of each token, at
    least 1 is counted). ``owners`` is `token_words`.
    """
    out = torch.full_like(words_S, -1)
    for word in sorted({w for w in words_S.tolist() if w >= 0}):
        tokens = [token for token, owner in enumerate(owners) if owner == word]
        if not tokens:
            continue
        places = (words_S == word).nonzero()[:, 0]
        share = torch.tensor([max(1, sizes[token]) for token in tokens], dtype=torch.float64)
        edges = share.cumsum(0) / share.sum()
        middle = (torch.arange(len(places), dtype=torch.float64) + 0.5) / len(places)
        picks = torch.searchsorted(edges, middle).clamp(max=len(tokens) - 1)
        out[places] = torch.tensor(tokens)[picks]
    return out


def _silence(frames: int, blank: int, score: float) -> Alignment:
    labels = torch.full((frames,), blank, dtype=torch.int64)
    return Alignment(labels, torch.full((frames,), -1, dtype=torch.int64), score)
