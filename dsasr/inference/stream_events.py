"""What a live stream gives: partial texts on the way and final ones."""

from __future__ import annotations

from dataclasses import dataclass

from dsasr.inference.words import Word


@dataclass(frozen=True)
class Partial:
    """The text of an utterance so far. The first ``settled`` characters of ``text`` stay the same
    in later partial texts. ``start`` and ``end`` are in seconds of the stream."""

    start: float
    end: float
    text: str
    settled: int


@dataclass(frozen=True)
class Final:
    """The text of an utterance; empty if it was probably no speech (``no_speech``). ``start`` and
    ``end``, and the times of ``words``, are in seconds of the stream.

    ``confidence``, ``heard`` and ``doubt``: as `dsasr.inference.transcript.Segment`'s; ``finished``
    is False if the text was cut at the token limit.
    """

    start: float
    end: float
    text: str
    confidence: float
    no_speech: bool
    finished: bool
    doubt: tuple[str, ...] = ()
    heard: float | None = None
    words: tuple[Word, ...] = ()
