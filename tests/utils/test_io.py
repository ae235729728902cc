"""Files that other rooms write and read."""

from __future__ import annotations

import json
import math

import pytest

from dsasr.utils.io import read_json_lines, read_lines, to_json


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
    held = {"a": [math.nan, (1.5, -math.inf)], "b": {"c": math.inf, "d": "∞"}, "e": 2, "f": True}
    text = to_json(held, indent=1)
    assert "∞" in text and "\n" in text and held["b"]["c"] == math.inf

    def never(constant):
        raise AssertionError(constant)

    back = json.loads(text, parse_constant=never)
    assert back == {"a": [None, [1.5, None]], "b": {"c": None, "d": "∞"}, "e": 2, "f": True}
