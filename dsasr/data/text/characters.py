"""Character labels, instead of phonemes, for a conventional CTC encoder."""

from __future__ import annotations

from dsasr.data.text.normalization import TextConfig, normalize_text

BOUNDARY = "▁"  # between words
# The form of a transcript that its letters and tokens are those of.
WRITTEN_FORM = TextConfig(case="lower", punctuation="strip")


class CharacterPhonemizer:
    """Each letter, digit or Han character is a symbol, in lower case and without punctuation; a
    space, which Han text has none of, is `BOUNDARY`."""

    def phonemes(self, text: str, lang: str = "") -> list[str]:
        return [BOUNDARY if c == " " else c for c in normalize_text(text, WRITTEN_FORM)]

    def for_sample(self, sample) -> list[str]:
        return self.phonemes(sample.text, sample.lang)
