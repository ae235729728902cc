"""A recipe's text reads back as its settings, whatever is in them."""

from __future__ import annotations

import pytest

from dsasr import config
from dsasr.setup.recipe_text import Setting, differing, values_of, write


@pytest.mark.parametrize(
    "path", ["plain/shards", "with space/a: b", "new\nline", "# hash", "'quote\"", "[x]", "1e3", ""]
)
def test_any_path_reads_back(path):
    settings = [Setting("run", path, "why"), Setting("data.train", [{"shards": path}], "x: y # z")]
    values = config.parse_yaml(write(["A title: with a colon"], "whisper-qwen3", settings))
    assert values == {"base": "whisper-qwen3", "run": path, "data": {"train": [{"shards": path}]}}


def test_sections_are_opened_once_and_each_line_has_its_reason():
    settings = [
        Setting("data.text.case", "lower", "because"),
        Setting("run", "runs/x", "where"),
        Setting("data.text.punctuation", "keep", "since"),
        Setting("data.cmvn", None, "none"),
        Setting("stages", [{"name": "a"}, {"name": "b"}], "two", ("first", "second")),
    ]
    text = write(["title"], "demo", settings)
    assert text.count("data:") == 1 and text.count("text:") == 1
    for why in ("because", "where", "since", "none", "two", "first", "second"):
        assert f"# {why}" in text
    values = config.parse_yaml(text)
    assert values.pop("base") == "demo" and values == values_of(settings)


def test_what_the_base_has_is_left_out():
    base = {"a": {"b": 1, "c": None}}
    given = [Setting("a.b", 1, ""), Setting("a.c", None, ""), Setting("a.d", None, "")]
    assert [s.key for s in differing([base], given)] == ["a.d"]
