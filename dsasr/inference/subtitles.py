"""Subtitles from words with times: SubRip and WebVTT, in lines that fit a screen."""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from dsasr.data.text.scripts import HAN_CHARACTER
from dsasr.inference.words import Word, spread
from dsasr.utils.columns import width

LINE = 42  # columns of a line; a wide character (Han, kana) takes two
LINES = 2  # of a subtitle
PAUSE = 0.8  # seconds without a word that end a subtitle
LONGEST = 6.0  # seconds of a subtitle


class Spoken(Protocol):
    """A stretch of text with its times in seconds; ``words`` may be empty."""

    text: str
    start: float
    end: float
    words: tuple[Word, ...]


@dataclass(frozen=True)
class Cue:
    """One subtitle: its times in seconds and its lines."""

    start: float
    end: float
    lines: tuple[str, ...]


def cues(segments: Sequence[Spoken]) -> Iterator[Cue]:
    """The subtitles of ``segments``; each begins and ends with a segment's words."""
    for segment in segments:
        words = segment.words or spread(segment.text, segment.start, segment.end)
        group: list[Word] = []
        lines: list[str] = []
        for word in words:
            longer = _add(lines, word.text)
            ends = group and (
                longer is None
                or word.start - group[-1].end > PAUSE
                or word.end - group[0].start > LONGEST
            )
            if ends:
                yield Cue(group[0].start, group[-1].end, tuple(lines))
                group, longer = [], _add([], word.text)
            group.append(word)
            lines = longer or [word.text]  # one word may be wider than a line
        if group:
            yield Cue(group[0].start, group[-1].end, tuple(lines))


def srt(segments: Sequence[Spoken]) -> str:
    """As SubRip."""
    return "\n".join(
        f"{number}\n{_time(c.start, ',')} --> {_time(c.end, ',')}\n{chr(10).join(c.lines)}\n"
        for number, c in enumerate(cues(segments), 1)
    )


def vtt(segments: Sequence[Spoken]) -> str:
    """As WebVTT; its text is escaped."""
    body = (
        f"{_time(c.start, '.')} --> {_time(c.end, '.')}\n"
        f"{html.escape(chr(10).join(c.lines), quote=False)}\n"
        for c in cues(segments)
    )
    return "\n".join(("WEBVTT\n", *body))


def _add(lines: list[str], word: str) -> list[str] | None:
    """``lines`` with one more word, or None where it does not fit into `LINES`."""
    if not lines:
        return [word] if width(word) <= LINE else _chopped(word)
    joint = "" if HAN_CHARACTER.match(word[0]) and HAN_CHARACTER.match(lines[-1][-1]) else " "
    longer = lines[-1] + joint + word
    if width(longer) <= LINE:
        return [*lines[:-1], longer]
    if len(lines) < LINES and width(word) <= LINE:
        return [*lines, word]
    return None


def _chopped(word: str) -> list[str]:
    """A word wider than a line, in lines."""
    lines = [""]
    for character in word:
        if width(lines[-1] + character) > LINE:
            lines.append("")
        lines[-1] += character
    return lines


def _time(seconds: float, mark: str) -> str:
    """``hh:mm:ss,mmm``, with ``mark`` before the milliseconds."""
    total, milliseconds = divmod(round(seconds * 1000), 1000)
    hours, minutes = total // 3600, total // 60 % 60
    return f"{hours:02d}:{minutes:02d}:{total % 60:02d}{mark}{milliseconds:03d}"
