"""From transcripts to the units of the CTC head."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dsasr.data.text.characters import CharacterPhonemizer
from dsasr.data.text.espeak_phonemizer import EspeakPhonemizer
from dsasr.data.text.lexicon import LexiconPhonemizer
from dsasr.data.text.phoneme_vocab import PhonemeVocab, UnknownPhoneme
from dsasr.data.text.phonemizer import MissingPhonemes, Phonemizer, UnknownWord
from dsasr.data.text.token_units import TokenPhonemizer
from dsasr.utils.errors import UserError

VARIANTS = 8  # pronunciations of a text, at most


@dataclass(frozen=True)
class Speller:
    """From a transcript to the ids of its units."""

    phonemizer: Phonemizer
    vocab: PhonemeVocab

    def __call__(self, text: str, lang: str) -> list[int] | None:
        """None where the phonemizer lacks a word, or the vocabulary a unit."""
        return self._encode(lambda: self.phonemizer.phonemes(text, lang))

    @property
    def writes_text(self) -> bool:
        """Whether the units are characters or tokens, of which a text's beginning has the first."""
        return isinstance(self.phonemizer, CharacterPhonemizer | TokenPhonemizer)

    def pronunciations(self, text: str, lang: str) -> list[list[int]]:
        """The units of each pronunciation of ``text``, the usual one first, at most `VARIANTS`.

        A lexicon's words may have several; of another phonemizer the words read one by one count
        as a second one, since what it says at their joins differs by speaker. Empty where the
        phonemizer cannot read ``text``.
        """
        usual = self(text, lang)
        if usual is None:
            return []
        if isinstance(self.phonemizer, LexiconPhonemizer):
            readings = self.phonemizer.variants(text, VARIANTS)
            others = [self._encode(lambda r=reading: r) for reading in readings]
        elif isinstance(self.phonemizer, EspeakPhonemizer):
            words = [self(word, lang) for word in text.split()]
            others = [None if None in words else list(itertools.chain(*words))]
        else:
            others = []
        found = {tuple(units): None for units in (usual, *others) if units is not None}
        return [list(units) for units in found]

    def _encode(self, read: Callable[[], Sequence[str]]) -> list[int] | None:
        try:
            return self.vocab.encode(read())
        except (UnknownPhoneme, UnknownWord, MissingPhonemes, UserError):
            return None
