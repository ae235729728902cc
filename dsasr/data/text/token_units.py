"""A language model's own tokens as labels: CTC then writes what the language model reads."""

from __future__ import annotations

from dsasr.data.text.characters import WRITTEN_FORM
from dsasr.data.text.normalization import normalize_text
from dsasr.data.text.tokenizers import Tokenizer


class TokenPhonemizer:
    """Each token of a transcript is a symbol, spelled as the tokenizer's vocabulary spells it.

    The transcript is in lower case and without punctuation, with a space before it, so that the
    first word has the tokens that it has in the midst of a sentence. A CTC vocabulary has the
    tokens that occur in its corpus, some thousands of a tokenizer's hundred thousand.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._pieces = tokenizer.pieces()
        plain = tokenizer.encode("a")
        # SentencePiece puts a space before a text by itself.
        self._space = "" if tokenizer.encode(" a") == plain or "▁a" in self._spell(plain) else " "

    def _spell(self, ids: list[int]) -> list[str]:
        return [self._pieces[number] for number in ids]

    def phonemes(self, text: str, lang: str = "") -> list[str]:
        text = normalize_text(text, WRITTEN_FORM)
        return self._spell(self.tokenizer.encode(self._space + text)) if text else []

    def for_sample(self, sample) -> list[str]:
        return self.phonemes(sample.text, sample.lang)
