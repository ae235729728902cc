"""The phoneme vocabulary and its file."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsasr.data.text.phoneme_vocab import PhonemeVocab, UnknownPhoneme
from dsasr.utils.errors import UserError


def test_the_order_does_not_depend_on_the_data(tmp_path):
    one = PhonemeVocab.build([["b", "a"], ["ŋ", "a1"]])
    two = PhonemeVocab.build([["a1", "ŋ", "a"], ["b"]])
    assert one.symbols == two.symbols == ("<blk>", "a", "a1", "b", "ŋ")
    assert one == two and one.fingerprint == two.fingerprint
    one.save(tmp_path / "v.json")
    again = PhonemeVocab.load(tmp_path / "v.json")
    assert again == one and len(again) == 5


@given(st.lists(st.text(min_size=1).filter(lambda s: s != "<blk>"), min_size=1))
def test_round_trip(symbols):
    vocab = PhonemeVocab.build([symbols])
    ids = vocab.encode(symbols)
    assert 0 not in ids
    assert vocab.decode([0, *ids, 0]) == symbols


def test_it_names_what_it_does_not_hold():
    with pytest.raises(UnknownPhoneme) as caught:
        PhonemeVocab(["a"]).encode(["a", "ʔ"])
    assert caught.value.symbol == "ʔ"


def test_it_refuses_bad_files(tmp_path):
    path = tmp_path / "v.json"
    with pytest.raises(UserError, match="not there"):
        PhonemeVocab.load(path)
    path.write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        PhonemeVocab.load(path)
    PhonemeVocab(["a", "b"]).save(path)
    good = json.loads(path.read_text())
    for change, message in (
        ({"version": 99}, "version 99"),
        ({"format": "other"}, "not a phoneme vocabulary"),
        ({"symbols": ["a", "b"]}, "must start"),
        ({"symbols": ["<blk>", "b", "a"]}, "fingerprint"),
        ({"symbols": ["<blk>", "a", "a"]}, "repeated"),
        ({"symbols": ["<blk>", 3]}, "strings"),
    ):
        path.write_text(json.dumps({**good, **change}))
        with pytest.raises(UserError, match=message):
            PhonemeVocab.load(path)
