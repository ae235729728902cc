"""Files and folders that appear whole or not at all; JSON lines."""

from __future__ import annotations

import json
import math

import pytest

from dsasr.utils.io import (
    atomic_folder,
    read_json_lines,
    read_lines,
    remove_folder,
    remove_temporaries,
    to_json,
)


@pytest.mark.parametrize("rows", [[], ["a"], ["a\u2028b", "c\x85d", ""], ["", "e\x0cf"]])
def test_a_line_of_json_ends_at_a_line_feed_alone(tmp_path, rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), "utf-8")
    assert [json.loads(line) for line in read_lines(path)] == rows


def test_a_torn_last_line_is_no_row(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n{"a": ', "utf-8")
    assert read_lines(path) == ['{"a": 1}', '{"a": ']
    assert read_json_lines(path) == [{"a": 1}] and read_json_lines(tmp_path / "none.jsonl") == []


def test_json_holds_neither_nan_nor_infinity():
    value = {"a": [math.nan, (1.5, -math.inf)], "b": {"c": math.inf, "d": "∞"}, "e": 2, "f": True}
    text = to_json(value, indent=1)
    assert "∞" in text and "\n" in text and value["b"]["c"] == math.inf

    def never(constant):
        raise AssertionError(constant)

    back = json.loads(text, parse_constant=never)
    assert back == {"a": [None, [1.5, None]], "b": {"c": None, "d": "∞"}, "e": 2, "f": True}


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    target = tmp_path / "model"
    with atomic_folder(target) as folder:
        (folder / "inner").mkdir()
        (folder / "inner" / "a").write_text("1")
        assert not target.exists() and folder.name.startswith(".")
    assert (target / "inner" / "a").read_text() == "1"
    with pytest.raises(OSError, match="full"), atomic_folder(target) as folder:
        (folder / "b").write_text("2")
        raise OSError("full")
    assert [path.name for path in target.iterdir()] == ["inner"]
    with atomic_folder(target) as folder:
        (folder / "b").write_text("2")
    assert [path.name for path in target.iterdir()] == ["b"]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert remove_folder(target) and not remove_folder(target)
    assert not list(tmp_path.iterdir())


def test_temporaries_go_but_for_those_that_may_be_in_use(tmp_path):
    for name in (".a.tmp", ".in-use-x.json.1.tmp", ".hidden", "plain.tmp"):
        (tmp_path / name).write_text("")
    (tmp_path / ".step-1.gone.tmp").mkdir()
    remove_temporaries(tmp_path, spare=("in-use-",))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".hidden", ".in-use-x.json.1.tmp", "plain.tmp"
    ]  # fmt: skip
