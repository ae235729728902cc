"""The phoneme vocabulary: symbols and their ids, as a file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from dsasr.utils.errors import UserError
from dsasr.utils.io import atomic_write

BLANK = "<blk>"
VOCAB_FORMAT = "dsasr-phonemes"
VOCAB_VERSION = 1


class UnknownPhoneme(ValueError):
    """``symbol`` is not in the phoneme vocabulary."""

    def __init__(self, symbol: str) -> None:
        super().__init__(f"phoneme {symbol!r} is not in the vocabulary")
        self.symbol = symbol


class PhonemeVocab:
    """Symbols and their ids; id 0 is CTC's blank. The order never changes once it is saved."""

    def __init__(self, symbols: Sequence[str]) -> None:
        """``symbols`` without the blank, in id order from 1 on."""
        symbols = list(symbols)
        if len(set(symbols)) != len(symbols) or BLANK in symbols or "" in symbols:
            raise UserError("phoneme vocabulary: empty, repeated or reserved symbol")
        self.symbols: tuple[str, ...] = (BLANK, *symbols)
        self._ids = {symbol: number for number, symbol in enumerate(self.symbols)}

    @classmethod
    def build(cls, sequences: Iterable[Iterable[str]]) -> PhonemeVocab:
        """All symbols that occur, in code-point order: whatever the order of the samples."""
        return cls(sorted({symbol for sequence in sequences for symbol in sequence}))

    def __len__(self) -> int:
        return len(self.symbols)

    def __eq__(self, other) -> bool:
        return isinstance(other, PhonemeVocab) and self.symbols == other.symbols

    def __hash__(self) -> int:
        return hash(self.symbols)

    @property
    def fingerprint(self) -> str:
        """Twelve hex digits that two vocabularies share only if they are the same."""
        return hashlib.sha256("\n".join(self.symbols).encode()).hexdigest()[:12]

    def encode(self, phonemes: Iterable[str]) -> list[int]:
        """Ids of ``phonemes``. Raises `UnknownPhoneme` with the first symbol that has none."""
        try:
            return [self._ids[symbol] for symbol in phonemes]
        except KeyError as error:
            raise UnknownPhoneme(error.args[0]) from None

    def decode(self, ids: Iterable[int]) -> list[str]:
        """Symbols of ``ids``, blanks left out."""
        return [self.symbols[number] for number in ids if number != 0]

    def save(self, path: str | Path) -> None:
        document = {
            "format": VOCAB_FORMAT,
            "version": VOCAB_VERSION,
            "fingerprint": self.fingerprint,
            "symbols": list(self.symbols),
        }
        atomic_write(path, json.dumps(document, ensure_ascii=False, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> PhonemeVocab:
        """Read what `save` wrote. Raises `UserError` if it is missing, torn or of another kind."""
        try:
            document = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError:
            raise UserError(f"phoneme vocabulary {path} is not there") from None
        except ValueError:
            raise UserError(f"phoneme vocabulary {path} is not JSON: build it again") from None
        if not isinstance(document, dict) or document.get("format") != VOCAB_FORMAT:
            raise UserError(f"{path} is not a phoneme vocabulary ({VOCAB_FORMAT})")
        if document.get("version") != VOCAB_VERSION:
            raise UserError(
                f"phoneme vocabulary {path} has version {document.get('version')}, "
                f"this code reads {VOCAB_VERSION}: build it again"
            )
        symbols = document.get("symbols")
        if not isinstance(symbols, list) or symbols[:1] != [BLANK]:
            raise UserError(f"phoneme vocabulary {path}: symbols must start with {BLANK}")
        if not all(isinstance(symbol, str) for symbol in symbols):
            raise UserError(f"phoneme vocabulary {path}: symbols must be strings")
        vocab = cls(symbols[1:])
        if document.get("fingerprint") != vocab.fingerprint:
            raise UserError(f"phoneme vocabulary {path} was edited: fingerprint differs")
        return vocab
