"""Text of others on a terminal: escape sequences are shown, not obeyed.

Names, languages and transcripts of data may hold control characters, with which a terminal can be
made to hide lines, change its title or type. All that a command prints passes `EscapedText`.
"""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Iterator
from typing import Any, TextIO

# C0 without tab and line feed, delete, C1; a lone surrogate would stop the printing.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
_BREAK = re.compile("[\t\n\x0b\x0c\r\x85\u2028\u2029]+")
_DIRECTION = re.compile("[\u200e\u200f\u202a-\u202e\u2066-\u2069]")  # UAX #9


def escaped(text: str) -> str:
    """``text`` with each control character as its escape, such as ``\\x1b``."""
    if text.isprintable():
        return text
    return _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), text)


def one_line(text: str) -> str:
    """``text`` for a cell of a screen: `escaped`, on one line, and without what changes the
    direction of the writing around it."""
    if text.isprintable():
        return text
    return _DIRECTION.sub("", escaped(" ".join(_BREAK.split(text))))


def beneath(stream: TextIO) -> TextIO:
    """The stream below an `EscapedText`, for what draws with escape sequences of its own and
    passes all text of others through `one_line`."""
    while isinstance(stream, EscapedText):
        stream = stream._stream
    return stream


class EscapedText:
    """A text stream that writes what is `escaped`; all else is the stream's own."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        # A progress bar returns to the start of its line, and clears it by writing over it.
        start = "\r" if text.startswith("\r") else ""
        end = "\r\n" if text.endswith("\r\n") and text != "\r\n" else ""
        inner = text[len(start) : len(text) - len(end)]
        return self._stream.write(f"{start}{escaped(inner)}{end}")

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def escaped_output() -> Iterator[None]:
    """Standard output and error as `EscapedText` meanwhile."""
    before = sys.stdout, sys.stderr
    for name, stream in zip(("stdout", "stderr"), before, strict=True):
        if stream is not None and not isinstance(stream, EscapedText):
            setattr(sys, name, EscapedText(stream))
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
