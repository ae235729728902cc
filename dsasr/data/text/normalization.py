"""The normalization of transcripts: into training targets, and into what a phonemizer reads."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass

from dsasr.data.text.scripts import HAN_SPACES, script_runs
from dsasr.utils.errors import UserError


@dataclass(frozen=True)
class TextConfig:
    """The form of training targets. ``case``: keep, lower, upper; ``punctuation``: keep, strip.

    Keep both if the transcripts have them and the language model uses them. ``empty``: drop samples
    without text (cause `empty_text`), or keep them as non-speech, whose CTC labels are blanks and
    whose transcript is the end token alone.
    """

    case: str = "keep"  # keep, lower or upper; phonemes are those of the text as it was
    punctuation: str = "keep"  # keep or strip
    # samples without text: drop (counted as empty_text), or keep as non-speech
    empty: str = "drop"
    # a space before the first word's tokens, as in the text that Whisper's decoder and base models
    # with a byte-level tokenizer were trained on
    leading_space: bool = False

    def __post_init__(self) -> None:
        if self.case not in ("keep", "lower", "upper"):
            raise UserError(f"text.case {self.case!r}: use keep, lower or upper")
        if self.punctuation not in ("keep", "strip"):
            raise UserError(f"text.punctuation {self.punctuation!r}: use keep or strip")
        if self.empty not in ("drop", "keep"):
            raise UserError(f"text.empty {self.empty!r}: use drop or keep")


def clean_text(text: str) -> str:
    """NFKC, single spaces, none between Han characters; control characters become spaces.

    A byte order mark (U+FEFF), which some editors put before a text, is dropped.
    """
    if text.isascii() and text.isprintable():
        return " ".join(text.split())
    text = unicodedata.normalize("NFKC", text.replace("\ufeff", ""))
    text = "".join(" " if unicodedata.category(c) == "Cc" else c for c in text)
    return HAN_SPACES.sub("", " ".join(text.split()))


def spoken_text(text: str) -> str:
    """`clean_text`, in lower case if it is a transcript in upper case (`is_upper_case`).

    A phonemizer with rules for abbreviations reads this, not the training target: that may be all
    of one case (``text.case``), and without the punctuation between clauses.
    """
    text = clean_text(text)
    return text.lower() if is_upper_case(text) else text


def is_upper_case(text: str) -> bool:
    """Whether ``text`` is written in upper case, which then marks no abbreviations (**ours**).

    It has no lower-case letter, and somewhere two words in a row, one of them of two letters at
    least: "IT IS", but not "US", nor "U S A", nor 打开 WIFI. A word alone may be either, and
    abbreviations that are no words (TV, CEO) are spelled by espeak-ng in lower case, too.
    """
    if not text.isupper():
        return False
    runs = (run for script, run in script_runs(text) if script != "zh")
    letters = ([sum(map(str.isalpha, word)) for word in run.split()] for run in runs)
    return any(sum(map(bool, of_run)) > 1 and max(of_run) > 1 for of_run in letters)


def normalize_text(text: str, config: TextConfig | None = None) -> str:
    """The training target for ``text``: `clean_text`, with case and punctuation as ``config`` says.

    An apostrophe within a word is not punctuation. Scoring has another normalization, which ignores
    more (`dsasr.evaluation.normalize`).
    """
    config = config or TextConfig()
    text = clean_text(text)
    if config.case != "keep":
        text = text.lower() if config.case == "lower" else text.upper()
        text = unicodedata.normalize("NFKC", text)  # a change of case may undo it
    if config.punctuation == "strip":
        text = text.replace("’", "'")
        text = "".join(c if c == "'" or unicodedata.category(c)[0] != "P" else " " for c in text)
        text = re.sub(r"(?<!\w)'|'(?!\w)", " ", text)
    return HAN_SPACES.sub("", " ".join(text.split()))
