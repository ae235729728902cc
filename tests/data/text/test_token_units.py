from __future__ import annotations

from types import SimpleNamespace

import pytest

from dsasr.data.text.build_phonemizer import PhonemizerConfig, build_phonemizer
from dsasr.data.text.token_units import TokenPhonemizer
from dsasr.utils.errors import UserError


def test_units_are_the_tokens_of_the_written_form(tokenizer):
    """Together they spell the transcript, and a word has the same units wherever it stands."""
    phonemizer = build_phonemizer(PhonemizerConfig("tokens"), tokenizer)
    ids = {piece: number for number, piece in tokenizer.pieces().items()}
    for text, written in (("Don't, GO!", "don't go"), ("我 要 去 Berlin 。", "我要去berlin")):
        units = phonemizer.for_sample(SimpleNamespace(text=text, lang=""))
        assert tokenizer.decode([ids[unit] for unit in units]).replace(" ", "") == written.replace(
            " ", ""
        )
    one, two = phonemizer.phonemes("go"), phonemizer.phonemes("we go")
    assert two[-len(one) :] == one and len(two) > len(one)
    assert phonemizer.phonemes(" . ") == []


def test_they_need_a_tokenizer():
    with pytest.raises(UserError, match="language model's tokenizer"):
        build_phonemizer(PhonemizerConfig("tokens"))


def test_the_space_before_the_first_word_is_there_once(trained_tokenizer):
    units = TokenPhonemizer(trained_tokenizer).phonemes("go")
    assert "".join(units) == "▁go"
