"""Phonemes by pronunciation lexicons: CMUdict, Kaldi, MFA."""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from dsasr.data.text.normalization import clean_text
from dsasr.data.text.phonemizer import UnknownWord
from dsasr.data.text.scripts import HAN, HAN_CHARACTER
from dsasr.utils.errors import UserError
from dsasr.utils.package_data import RECIPES

_NUMBER = re.compile(r"\d+(\.\d+)?(e-?\d+)?", re.IGNORECASE)
_VARIANT = re.compile(r"\(\d+\)$")
_ARPABET = re.compile(r"^([A-Z]+)[0-2]$")
_MARKS = "".join(  # combining marks (Mn, Mc), as of Devanagari, Thai, Arabic and NFD: not in \\w
    chr(code) for code in range(0x300, 0x20000) if unicodedata.category(chr(code)) in ("Mn", "Mc")
)
# Zero-width joiners are part of words, too (Persian, Devanagari).
_WORD = re.compile(f"[{HAN}]+|(?:[^\\W_{HAN}]|['’\u200c\u200d{_MARKS}])+")


def lexicon_path(path: str | Path) -> Path:
    """The file of a lexicon: a bare name that is not in the working directory is looked up beside
    the packaged recipes."""
    path = Path(path)
    packaged = path.name == str(path) and not path.exists() and (RECIPES / path).exists()
    return RECIPES / path if packaged else path


def _probability_columns(rows: Sequence[tuple]) -> int:
    """How many numbers stand between word and phonemes in every row (number, word, …).

    A phoneme may be a digit, so a column counts only where one of its numbers has a decimal point.
    """
    columns = 0
    while rows and all(len(row) > columns + 3 for row in rows):
        column = [row[columns + 2] for row in rows]
        if not all(map(_NUMBER.fullmatch, column)) or not any("." in value for value in column):
            break
        columns += 1
    return columns


class LexiconPhonemizer:
    """Pronunciations from one or more files: ``word<tab or spaces>phones``, one word a line.

    CMUdict's own files read as they are: ``;;;`` comments, ``#`` remarks, and variants ``(2)``, of
    which the first wins. So do Kaldi's lexiconp.txt and MFA's dictionaries, whose columns of
    probabilities are left out. ARPAbet stress digits go unless ``stress``; pinyin tones stay. Words
    are looked up in lower case; a Han run takes the longest entry that fits, again and again.
    Files are found by `lexicon_path`. Raises `UserError` for a missing or malformed file,
    `UnknownWord` for a word that is not there.
    """

    def __init__(self, paths: str | Path | Sequence[str | Path], *, stress: bool = False) -> None:
        self.entries: dict[str, tuple[str, ...]] = {}
        self.others: dict[str, list[tuple[str, ...]]] = {}  # further pronunciations
        for path in [paths] if isinstance(paths, str | Path) else paths:
            self._read(Path(path), stress)
        if not self.entries:
            raise UserError("a lexicon phonemizer needs a lexicon file: set phonemizer.lexicons")
        self._longest = max((len(w) for w in self.entries if HAN_CHARACTER.match(w)), default=0)

    def _read(self, path: Path, stress: bool) -> None:
        path = lexicon_path(path)
        try:
            lines = path.read_text(encoding="utf-8-sig").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"lexicon {path} cannot be read: {error}") from None
        rows = []
        for number, line in enumerate(lines, 1):
            line = line.split(" #")[0].strip()
            if line and not line.startswith((";;;", "#")):
                rows.append((number, *line.split()))
        numbers = _probability_columns(rows)
        for number, word, *phones in rows:
            phones = phones[numbers:]
            if not phones:
                raise UserError(f"lexicon {path} line {number}: {word!r} has no phonemes")
            if not stress:
                phones = [_ARPABET.sub(r"\1", phone) for phone in phones]
            name = clean_text(_VARIANT.sub("", word)).lower()
            if self.entries.setdefault(name, tuple(phones)) != tuple(phones):
                self.others.setdefault(name, []).append(tuple(phones))

    def phonemes(self, text: str, lang: str = "") -> list[str]:
        return [symbol for word in self._words(text) for symbol in self.entries[word]]

    def variants(self, text: str, limit: int) -> list[list[str]]:
        """Up to ``limit`` pronunciations of ``text``: one of each word's, in every combination."""
        choices = [[self.entries[w], *self.others.get(w, ())] for w in self._words(text)]
        product = itertools.islice(itertools.product(*choices), limit)
        return [[symbol for word in words for symbol in word] for words in product]

    def _words(self, text: str) -> list[str]:
        """The entries that ``text`` is read by."""
        words: list[str] = []
        for match in _WORD.finditer(clean_text(text)):
            word = match.group().lower().replace("’", "'")
            bare = word.strip("'")
            if HAN_CHARACTER.match(word):
                words += self._han(word)
            elif word in self.entries or bare in self.entries:
                words.append(word if word in self.entries else bare)
            elif bare:
                raise UnknownWord(word)
        return words

    def _han(self, run: str) -> list[str]:
        words: list[str] = []
        start = 0
        while start < len(run):
            for length in range(min(self._longest, len(run) - start), 0, -1):
                if run[start : start + length] in self.entries:
                    words.append(run[start : start + length])
                    start += length
                    break
            else:
                raise UnknownWord(run[start])
        return words

    def for_sample(self, sample) -> list[str]:
        return self.phonemes(sample.text, sample.lang)
