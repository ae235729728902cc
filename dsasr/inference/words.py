"""Words with times: where they are in a text, and in its audio."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dsasr.entropy_allocation.forced_alignment import words_of
from dsasr.evaluation.ctc_scoring import AlignedSpan, CtcScore


@dataclass(frozen=True)
class Word:
    """A word with its times in seconds of the file or stream. ``confidence``: of its phonemes by
    the CTC head (`dsasr.evaluation.ctc_scoring`); None without a score, and then the times are its
    share of the `Stretch`, by characters."""

    text: str
    start: float
    end: float
    confidence: float | None = None


@dataclass(frozen=True)
class Stretch:
    """Where the transcript of a piece of audio is: encoder frames count from ``origin``, and words
    are between ``start`` and ``end``, all in seconds."""

    origin: float
    start: float
    end: float
    frame_seconds: float

    def words(self, text: str, ctc: CtcScore | None) -> tuple[tuple[Word, ...], tuple[Word, ...]]:
        """The words and the phonemes of ``text`` with their times: the CTC head's, or where it has
        none the words' share of the stretch and no phonemes."""
        if ctc is None or not ctc.words:
            return spread(text, self.start, self.end), ()
        return tuple(map(self._place, ctc.words)), tuple(map(self._place, ctc.phonemes))

    def _place(self, span: AlignedSpan) -> Word:
        seconds = (self.origin + frame * self.frame_seconds for frame in (span.start, span.end))
        # A head's frames at the edges reach into the silence: no word is there.
        start, end = (round(min(max(x, self.start), self.end), 3) for x in seconds)
        return Word(span.text, start, end, round(span.confidence, 4))


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
