"""Training targets: spaces, case, punctuation."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsasr.data.text.normalization import TextConfig, normalize_text, spoken_text
from dsasr.utils.errors import UserError


@pytest.mark.parametrize(
    ("text", "config", "result"),
    [
        ("  Ｈｅｌｌｏ \t world\n", TextConfig(), "Hello world"),
        ("你 好 吗", TextConfig(), "你好吗"),
        ("打开 wifi 吧", TextConfig(), "打开 wifi 吧"),
        ("Don't STOP, now!", TextConfig(case="lower", punctuation="strip"), "don't stop now"),
        ("'quoted' it’s", TextConfig(punctuation="strip"), "quoted it's"),
        ("你好，世界。", TextConfig(punctuation="strip"), "你好世界"),
        ("a\x00b", TextConfig(), "a b"),
        ("abc", TextConfig(case="upper"), "ABC"),
        ("_'a", TextConfig(punctuation="strip"), "a"),
        ("!?", TextConfig(punctuation="strip"), ""),
        ("\ufeffHello world", TextConfig(), "Hello world"),
    ],
)
def test_normalize_text(text, config, result):
    assert normalize_text(text, config) == result


@given(st.text())
def test_normalize_text_is_idempotent(text):
    config = TextConfig(case="lower", punctuation="strip")
    once = normalize_text(text, config)
    assert normalize_text(once, config) == once


@pytest.mark.parametrize(
    ("text", "spoken"),
    [
        ("WHAT IS IT?", "what is it?"),
        ("  I'M  HERE", "i'm here"),
        ("U.S. ARMY", "u.s. army"),
        ("ÜBER UNS", "über uns"),
        ("我 LOVE YOU", "我 love you"),
        # in mixed case, or alone, upper case may mark an abbreviation
        ("The US army", "The US army"),
        ("US", "US"),
        ("HELLO!", "HELLO!"),
        ("U S A", "U S A"),
        ("打开 WIFI 吧", "打开 WIFI 吧"),
        ("IT 和 AI", "IT 和 AI"),
        ("ROOM 101", "ROOM 101"),
        ("lower case", "lower case"),
        ("你好", "你好"),
        ("\ufeffＯＮＥ ＴＷＯ", "one two"),
        ("", ""),
    ],
)
def test_a_transcript_in_upper_case_is_spoken_in_lower_case(text, spoken):
    assert spoken_text(text) == spoken
    assert spoken_text(spoken) == spoken


@given(st.text())
def test_what_is_spoken_is_what_is_written_but_for_case(text):
    assert spoken_text(text).lower() == normalize_text(text).lower()


def test_text_config_errors():
    with pytest.raises(UserError, match="keep, lower or upper"):
        TextConfig(case="title")
    with pytest.raises(UserError, match="keep or strip"):
        TextConfig(punctuation="drop")
