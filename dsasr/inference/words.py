"""Words with times: where they are in a text, and in its audio."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dsasr.entropy_allocation.forced_alignment import words_of


@dataclass(frozen=True)
class Word:
    """A word with its times in seconds of the file. ``confidence``: of its
    phonemes by the CTC head (`dsasr.evaluation.ctc_scoring`); None without a score, and then the
    times are its share of the segment's, by characters."""

    text: str
    start: float
    end: float
    confidence: float | None = None


def spread(text: str, start: float, end: float) -> tuple[Word, ...]:
    """The words of ``text`` over the seconds from ``start`` to ``end``, by their characters."""
    words = words_of(text)
    total, at, out = sum(map(len, words)), 0, []
    for word in words:
        edges = [start + (end - start) * done / total for done in (at, at + len(word))]
        out.append(Word(word, *(round(edge, 3) for edge in edges)))
        at += len(word)
    return tuple(out)


def cut_text(text: str, words: Sequence[Word], first: int, stop: int) -> str:
    """The part of ``text`` from word ``first`` to before word ``stop``; ``words`` are all of its
    words, in order."""
    spans, at = [], 0
    for word in words:
        at = text.index(word.text, at)
        spans.append((at, at + len(word.text)))
        at += len(word.text)
    return text[spans[first][0] : spans[stop - 1][1]] if first < stop else ""
