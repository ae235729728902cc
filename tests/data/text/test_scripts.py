from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsasr.data.text.scripts import HAN_CHARACTER, HAN_SPACES, script_runs


def test_what_is_han():
    assert all(HAN_CHARACTER.match(c) for c in "一〇龥㐀𠀀豈")
    assert not any(HAN_CHARACTER.match(c) for c in "aé1，。 ぁ가")
    assert HAN_SPACES.sub("", "打 开 wifi 吧") == "打开 wifi 吧"


@pytest.mark.parametrize(
    ("text", "lang", "runs"),
    [
        ("turn on", "en", [("en", "turn on")]),
        ("打开 wifi 吧", "zh", [("zh", "打开 "), ("en", "wifi "), ("zh", "吧")]),
        ("3点", "zh", [("zh", "3点")]),
        ("12 apples, 好", "", [("en", "12 apples, "), ("zh", "好")]),
        ("123", "zh-CN", [("zh", "123")]),
        ("123", "en", [("en", "123")]),
        ("", "zh", []),
    ],
)
def test_script_runs(text, lang, runs):
    assert script_runs(text, lang) == runs


@given(st.text(alphabet="ab 好的1,。é"))
def test_script_runs_join_to_the_text(text):
    runs = script_runs(text)
    assert "".join(run for _, run in runs) == text
    scripts = [script for script, _ in runs]
    assert all(a != b for a, b in itertools.pairwise(scripts))
