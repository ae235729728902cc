"""Files that other rooms write and read."""

from __future__ import annotations

import json

import pytest

from dsasr.files import json_lines, text_lines


@pytest.mark.parametrize("rows", [[], ["a"], ["a\u2028b", "c\x85d", ""], ["", "e\x0cf"]])
def test_a_line_of_json_ends_at_a_line_feed_alone(tmp_path, rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), "utf-8")
    assert [json.loads(line) for line in text_lines(path)] == rows


def test_a_torn_last_line_is_no_row(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n{"a": ', "utf-8")
    assert text_lines(path) == ['{"a": 1}', '{"a": ']
    assert json_lines(path) == [{"a": 1}] and json_lines(tmp_path / "none.jsonl") == []
