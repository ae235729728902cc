"""The normalization of transcripts into training targets."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass

from dsasr.data.text.scripts import HAN_SPACES
from dsasr.utils.errors import UserError


@dataclass(frozen=True)
class TextConfig:
    """The form of training targets. ``case``: keep, lower, upper; ``punctuation``: keep, strip.

    Keep both if the transcripts have them and the language model uses them. ``empty``: drop samples
    without text (cause `empty_text`), or keep them as non-speech, whose CTC labels are blanks and
    whose transcript is the end token alone.
    """

    case: str = "keep"  # keep, lower or upper
    punctuation: str = "keep"  # keep or strip
    # samples without text: drop (counted as empty_text), or keep as non-speech
    empty: str = "drop"

    def __post_init__(self) -> None:
        if self.case not in ("keep", "lower", "upper"):
            raise UserError(f"text.case {self.case!r}: use keep, lower or upper")
        if self.punctuation not in ("keep", "strip"):
            raise UserError(f"text.punctuation {self.punctuation!r}: use keep or strip")
        if self.empty not in ("drop", "keep"):
            raise UserError(f"text.empty {self.empty!r}: use drop or keep")


def normalize_text(text: str, lang: str = "", config: TextConfig | None = None) -> str:
    """The training target for ``text``: NFKC, single spaces, none between Han characters.

    Control characters become spaces. Case and punctuation follow ``config``; an apostrophe within
    a word is not punctuation. Scoring has another normalization, which ignores more
    (`dsasr.evaluation.normalize`).
    """
    config = config or TextConfig()
    unchanged = config.case == "keep" and config.punctuation == "keep"
    if unchanged and text.isascii() and text.isprintable() and " ".join(text.split()) == text:
        return text
    text = unicodedata.normalize("NFKC", text)
    text = "".join(" " if unicodedata.category(c) == "Cc" else c for c in text)
    if config.case != "keep":
        text = text.lower() if config.case == "lower" else text.upper()
        text = unicodedata.normalize("NFKC", text)  # a change of case may undo it
    if config.punctuation == "strip":
        text = text.replace("’", "'")
        text = "".join(c if c == "'" or unicodedata.category(c)[0] != "P" else " " for c in text)
        text = re.sub(r"(?<!\w)'|'(?!\w)", " ", text)
    return HAN_SPACES.sub("", " ".join(text.split()))
