"""The phonemizer that a recipe's ``data.phonemizer`` names."""

from __future__ import annotations

from dataclasses import dataclass

from dsasr.data.text.characters import CharacterPhonemizer
from dsasr.data.text.espeak_phonemizer import EspeakPhonemizer
from dsasr.data.text.lexicon import LexiconPhonemizer
from dsasr.data.text.phonemizer import Phonemizer, StoredPhonemes
from dsasr.data.text.token_units import TokenPhonemizer
from dsasr.data.text.tokenizers import Tokenizer
from dsasr.utils.errors import UserError


@dataclass(frozen=True)
class PhonemizerConfig:
    """``kind``: stored, espeak, lexicon, or characters or tokens (conventional CTC, no phonemes at
    all); ``lexicons``: files for kind lexicon."""

    # stored (in the shards), espeak (by each sample's language), lexicon, characters (labels are
    # letters: conventional CTC), or tokens (labels are the language model's)
    kind: str = "stored"
    # lexicon: pronunciation files; the first that has a word wins. digits.lexicon comes with dsasr.
    lexicons: tuple[str, ...] = ()
    stress: bool = False  # keep the stress marks of English vowels

    def __post_init__(self) -> None:
        if self.kind not in ("stored", "espeak", "lexicon", "characters", "tokens"):
            kinds = "stored, espeak, lexicon, characters or tokens"
            raise UserError(f"phonemizer kind {self.kind!r}: use {kinds}")
        if self.kind == "lexicon" and not self.lexicons:
            raise UserError("phonemizer kind lexicon needs lexicons=[FILE, …]")


def build_phonemizer(config: PhonemizerConfig, tokenizer: Tokenizer | None = None) -> Phonemizer:
    """The phonemizer that ``config`` names; kind tokens needs the language model's ``tokenizer``.

    Raises `UserError`.
    """
    if config.kind == "espeak":
        return EspeakPhonemizer(stress=config.stress)
    if config.kind == "lexicon":
        return LexiconPhonemizer(config.lexicons, stress=config.stress)
    if config.kind == "characters":
        return CharacterPhonemizer()
    if config.kind == "tokens":
        if tokenizer is None:
            raise UserError("phonemizer kind tokens: give the language model's tokenizer")
        return TokenPhonemizer(tokenizer)
    return StoredPhonemes()
