# ruff: noqa: SIM905 - phonemes read better as text

from types import SimpleNamespace

import pytest

from dsasr.data.text.build_phonemizer import PhonemizerConfig, build_phonemizer
from dsasr.data.text.phonemizer import StoredPhonemes
from dsasr.utils.errors import UserError


def test_build_phonemizer(lexicon):
    assert isinstance(build_phonemizer(PhonemizerConfig()), StoredPhonemes)
    config = PhonemizerConfig(kind="lexicon", lexicons=(str(lexicon),))
    sample = SimpleNamespace(text="hello", lang="en", phonemes=None)
    assert build_phonemizer(config).for_sample(sample) == "HH AH L OW".split()
    with pytest.raises(UserError, match="characters or tokens"):
        PhonemizerConfig(kind="g2p")
    with pytest.raises(UserError, match="lexicons"):
        PhonemizerConfig(kind="lexicon")


def test_characters():
    phonemizer = build_phonemizer(PhonemizerConfig("characters"))
    assert phonemizer.phonemes("Don't, go!") == list("don't▁go")
    assert phonemizer.phonemes("我 要 去 Berlin 。", "zh-en") == [*"我要去", "▁", *"berlin"]
    assert phonemizer.phonemes("") == []
