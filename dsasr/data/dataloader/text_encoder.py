"""From transcripts to the labels of CTC and of the language model."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dsasr.data.dataloader.window_plan import uniform
from dsasr.data.shards.sample import BadSample, Sample
from dsasr.data.text.normalization import TextConfig, normalize_text
from dsasr.data.text.phoneme_vocab import PhonemeVocab, UnknownPhoneme
from dsasr.data.text.phonemizer import MissingPhonemes, Phonemizer, UnknownWord
from dsasr.data.text.prompt import find_language
from dsasr.data.text.tokenizers import Tokenizer

HINTED = 101  # salt of a sample's draw, beside those of its augmentation


@dataclass(frozen=True)
class TextEncoder:
    """Transcripts to labels. SFT needs no phonemizer, CTC no tokenizer: those are None.

    ``languages`` are those that a prompt can name, and ``language_share`` the share of their
    samples whose prompt does (`hint`).
    """

    config: TextConfig | None = None
    phonemizer: Phonemizer | None = None
    vocab: PhonemeVocab | None = None
    tokenizer: Tokenizer | None = None
    languages: tuple[str, ...] = ()
    language_share: float = 0.0

    def hint(self, lang: str, seed: int) -> str:
        """The language that the prompt of a sample in ``lang`` names, as in `Batch.hints`.

        ``seed`` is the sample's own, from seed, epoch and key: no other sample changes the draw.
        """
        named = find_language(lang, self.languages) if lang and self.languages else ""
        drawn = named and uniform(np.array([seed], np.uint64), HINTED)[0] < self.language_share
        return named if drawn else ""

    @property
    def pad_id(self) -> int:
        return self.tokenizer.pad_id if self.tokenizer is not None else 0

    def encode(self, sample: Sample) -> tuple[str, list[int], list[int]]:
        """(normalized text, phoneme ids, transcript tokens + end_id). Raises `BadSample`.

        Phoneme ids are empty without a phonemizer, tokens without a tokenizer.
        """

        def bad(cause: str, detail: str) -> BadSample:
            return BadSample(cause, sample.shard, sample.key, detail)

        text = normalize_text(sample.text, self.config)
        if not text and (self.config is None or self.config.empty == "drop"):
            raise bad("empty_text", repr(sample.text[:40]))
        phonemes: list[int] = []
        if self.phonemizer is not None:
            try:
                symbols = self.phonemizer.for_sample(sample)
                phonemes = self.vocab.encode(symbols) if self.vocab is not None else []
            except UnknownPhoneme as error:
                raise bad("unknown_phoneme", str(error)) from None
            except UnknownWord as error:
                raise bad("unknown_word", str(error)) from None
            except MissingPhonemes as error:
                raise bad("missing_phonemes", str(error)) from None
            if text and not symbols:
                raise bad("no_phonemes", repr(text[:40]))
        tokens: list[int] = []
        if self.tokenizer is not None:
            space = " " if text and self.config is not None and self.config.leading_space else ""
            tokens = [*self.tokenizer.encode(space + text), self.tokenizer.end_id]
        return text, phonemes, tokens
