"""What a phonemizer is, how it fails, and the one that reads the phonemes stored in shards."""

from __future__ import annotations

from typing import Protocol, runtime_checkable


class UnknownWord(ValueError):
    """The phonemizer has no pronunciation of ``word``."""

    def __init__(self, word: str) -> None:
        super().__init__(f"no pronunciation for {word!r}")
        self.word = word


class MissingPhonemes(ValueError):
    """A sample has no stored phonemes, but the phonemizer reads them from the shards."""


@runtime_checkable
class Phonemizer(Protocol):
    """Converts text to phonemes. The dataloader calls ``for_sample``."""

    def phonemes(self, text: str, lang: str) -> list[str]: ...

    def for_sample(self, sample) -> list[str]: ...


class StoredPhonemes:
    """Phonemes stored in the shards, in each sample's ``phonemes``.

    Raises `MissingPhonemes` for a sample without them, and for text alone (`phonemes`).
    """

    def phonemes(self, text: str, lang: str = "") -> list[str]:
        raise MissingPhonemes("stored phonemes belong to samples: for new text choose espeak")

    def for_sample(self, sample) -> list[str]:
        if sample.phonemes is None:
            raise MissingPhonemes("the sample stores no phonemes")
        return list(sample.phonemes)
