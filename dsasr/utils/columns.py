"""Rows of cells as aligned lines of text."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

WIDTH = 100  # cells of a screen


def columns(rows: Sequence[Sequence[str]], left: Sequence[int] = (0,), gap: int = 3) -> list[str]:
    """Each row as a line; the columns of ``left`` are aligned on the left, others on the right."""
    widths = [max(map(width, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = (
            cell + " " * (most - width(cell)) if i in left else " " * (most - width(cell)) + cell
            for i, (cell, most) in enumerate(zip(row, widths, strict=True))
        )
        lines.append((" " * gap).join(cells).rstrip())
    return lines


def width(text: str) -> int:
    """The cells of a terminal that ``text`` takes: two for a wide character, none for a mark."""
    return sum(
        0 if unicodedata.combining(c) else 1 + (unicodedata.east_asian_width(c) in "WF")
        for c in text
    )


def shortened(text: str, most: int) -> str:
    """``text`` in at most ``most`` cells, with … where it is cut."""
    if width(text) <= most:
        return text
    kept = ""
    for character in text:
        if width(kept + character) > most - 1:
            break
        kept += character
    return kept + "…"
