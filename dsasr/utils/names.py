"""The form of names: of stages and datasets in a recipe, of languages and speakers in data.

Names become parts of file names, tags of TensorBoard, columns of tables and parts of each other
(``wer/en``), so they have no slash, no markup and no control character.
"""

from __future__ import annotations

import re

from dsasr.utils.errors import UserError

_NAME = re.compile(r"\w[\w.+-]{0,63}")
_LANGUAGE = re.compile(r"\w[\w .,()+-]{0,63}")
LONGEST_SPEAKER = 256  # characters


def check_name(name: str, what: str) -> None:
    """Raise `UserError` unless ``name`` can be that of ``what``: a stage, a dataset."""
    if not _NAME.fullmatch(name):
        raise UserError(
            f"{what} is called {name[:80]!r}: a name has letters, digits and _ . + -, begins with "
            "a letter or digit, and is at most 64 characters long"
        )


def is_language(name: str) -> bool:
    """Whether ``name`` can be a language's, such as en or zh-CN; empty: not known."""
    return not name or bool(_LANGUAGE.fullmatch(name))


def is_speaker(name: str) -> bool:
    """Whether ``name`` can be a speaker's: any printable text on one line, not too long."""
    return len(name) <= LONGEST_SPEAKER and name.isprintable()
