# ruff: noqa: SIM905 - phonemes read better as text


import pytest

from dsasr.data.text.lexicon import LexiconPhonemizer
from dsasr.data.text.phonemizer import UnknownWord
from dsasr.utils.errors import UserError


def test_lexicon(lexicon):
    phonemizer = LexiconPhonemizer(lexicon)
    assert phonemizer.phonemes("Hello, 你好!") == "HH AH L OW n i3 h ao3".split()
    assert phonemizer.phonemes("don’t 'read'") == "D OW N T R EH D".split()
    assert phonemizer.phonemes("好你好你") == "h ao3 n i3 h ao3 n i3".split()
    assert LexiconPhonemizer(lexicon, stress=True).phonemes("hello") == "HH AH0 L OW1".split()


def test_a_byte_order_mark_is_no_part_of_a_word(tmp_path):
    path = tmp_path / "l.txt"
    path.write_text("one W AH N\ntwo T UW\n", encoding="utf-8-sig")
    assert LexiconPhonemizer(path).phonemes("\ufeffONE ｔｗｏ") == "W AH N T UW".split()


def test_lexicon_takes_the_longest_match(tmp_path):
    path = tmp_path / "l.txt"
    path.write_text("行 x ing2\n银 y in2\n银行 y in2 h ang2\n", encoding="utf-8")
    assert LexiconPhonemizer(path).phonemes("银行行") == "y in2 h ang2 x ing2".split()


def test_the_digits_lexicon_travels_with_the_package(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert LexiconPhonemizer("digits.lexicon").phonemes("two") == ["T", "UW"]
    (tmp_path / "digits.lexicon").write_text("two MINE\n")  # a file of the user's comes first
    assert LexiconPhonemizer("digits.lexicon").phonemes("two") == ["MINE"]


def test_lexicon_errors(lexicon, tmp_path):
    with pytest.raises(UnknownWord) as caught:
        LexiconPhonemizer(lexicon).phonemes("hello world")
    assert caught.value.word == "world"
    with pytest.raises(UnknownWord) as caught:
        LexiconPhonemizer(lexicon).phonemes("你坏")
    assert caught.value.word == "坏"
    with pytest.raises(UserError, match="cannot be read"):
        LexiconPhonemizer(tmp_path / "none.txt")
    (tmp_path / "bad.txt").write_text("word\n")
    with pytest.raises(UserError, match="line 1"):
        LexiconPhonemizer(tmp_path / "bad.txt")


@pytest.mark.parametrize(
    ("lines", "said", "phones"),
    [
        ("नमस्ते n a m a s t e\nदुनिया d u n i y aa\n", "नमस्ते, दुनिया!", "n a m a s t e d u n i y aa"),
        ("สวัสดี s a w a t d ii\n", "สวัสดี", "s a w a t d ii"),
        ("مَرْحَبًا m a r h a b a n\n", "مَرْحَبًا؟", "m a r h a b a n"),
        ("cafe\u0301 k a f e\n", "caf\u00e9 CAFE\u0301", "k a f e k a f e"),
        ("می\u200cروم m i r a v a m\n", "می\u200cروم.", "m i r a v a m"),
    ],
    ids=["Hindi", "Thai", "Arabic", "NFD", "Persian"],
)
def test_combining_marks_are_part_of_a_word(tmp_path, lines, said, phones):
    path = tmp_path / "l.txt"
    path.write_text(lines, encoding="utf-8")
    assert LexiconPhonemizer(path).phonemes(said) == phones.split()


@pytest.mark.parametrize(
    "lines",
    [
        "one 1.0 W AH N\ntwo 0.25 T UW\n",  # Kaldi's lexiconp.txt
        "one\t0.99\t0.14\t1.0\t1.0\tW AH N\ntwo\t1\t0.1\t1\t1\tT UW\n",  # MFA's dictionaries
        "one 1e-2 W AH N\ntwo 0.25 T UW\n",
    ],
)
def test_pronunciation_probabilities_are_no_phonemes(tmp_path, lines):
    path = tmp_path / "l.txt"
    path.write_text(lines, encoding="utf-8")
    assert LexiconPhonemizer(path).phonemes("one two") == "W AH N T UW".split()


def test_a_phoneme_may_be_a_digit(tmp_path):
    path = tmp_path / "l.txt"
    path.write_text("a 1 2\nb 2 1\n", encoding="utf-8")
    assert LexiconPhonemizer(path).phonemes("a b") == "1 2 2 1".split()
