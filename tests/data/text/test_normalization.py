"""Training targets: spaces, case, punctuation."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsasr.data.text.normalization import TextConfig, normalize_text
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
    ],
)
def test_normalize_text(text, config, result):
    assert normalize_text(text, "", config) == result


@given(st.text())
def test_normalize_text_is_idempotent(text):
    config = TextConfig(case="lower", punctuation="strip")
    once = normalize_text(text, "", config)
    assert normalize_text(once, "", config) == once


def test_text_config_errors():
    with pytest.raises(UserError, match="keep, lower or upper"):
        TextConfig(case="title")
    with pytest.raises(UserError, match="keep or strip"):
        TextConfig(punctuation="drop")
