"""Aligned rows, in which wide characters take two cells."""

from __future__ import annotations

from dsasr.utils.columns import columns, shortened, width


def test_columns_are_aligned_by_cells():
    rows = [["set", "hours"], ["a", "1,234.5"], ["打开", "2"]]
    assert columns(rows) == ["set      hours", "a      1,234.5", "打开         2"]
    assert columns([["a", "b"], ["cc", ""]], left=(0, 1), gap=1) == ["a  b", "cc"]


def test_text_is_cut_to_cells():
    assert shortened("abc", 3) == "abc" and shortened("abcd", 3) == "ab…"
    assert shortened("打开灯", 5) == "打开…" and width(shortened("打开灯", 4)) <= 4
    assert width("e\u0301") == 1
