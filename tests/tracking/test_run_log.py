"""The reader of a run's logs, and their cut at a resume."""

from __future__ import annotations

import json

import pytest

from dsasr.tracking.run_log import (
    EVENTS,
    LEDGER,
    METRICS,
    is_finished,
    read_events,
    read_ledger,
    read_metrics,
    truncate_log,
    without_missing,
)
from dsasr.utils.errors import UserError


def write(path, rows, tail=""):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + tail, encoding="utf-8")


def test_a_torn_last_line_is_skipped_and_a_missing_file_has_no_rows(tmp_path):
    assert read_events(tmp_path) == read_metrics(tmp_path) == read_ledger(tmp_path) == []
    for name, read in ((EVENTS, read_events), (METRICS, read_metrics), (LEDGER, read_ledger)):
        write(tmp_path / name, [{"event": "a"}, {"event": "b\u2028c"}], tail='{"event": "sw')
        assert read(tmp_path) == [{"event": "a"}, {"event": "b\u2028c"}]


def test_strict_raises_for_a_missing_file_and_a_broken_line_before_the_last(tmp_path):
    with pytest.raises(UserError, match="no run folder"):
        read_events(tmp_path, strict=True)
    write(tmp_path / EVENTS, [{"event": "a"}], tail='{"event": "sw')
    assert read_events(tmp_path, strict=True) == [{"event": "a"}]
    write(tmp_path / EVENTS, [{"event": "a"}], tail='{"event": {"event": "b"}\n{"event": "c"}\n')
    assert read_events(tmp_path) == [{"event": "a"}, {"event": "c"}]
    with pytest.raises(UserError, match=r"events\.jsonl line 2 is not JSON"):
        read_events(tmp_path, strict=True)


def test_a_run_is_finished_by_its_event(tmp_path):
    assert not is_finished(tmp_path)
    write(tmp_path / EVENTS, [{"event": "stage"}], tail='{"event": "finished"')
    assert not is_finished(tmp_path)
    write(tmp_path / EVENTS, [{"event": "stage"}, {"event": "finished"}])
    assert is_finished(tmp_path)


def test_missing_values_are_dropped_at_any_depth():
    row = {"a": 1, "b": None, "c": float("nan"), "d": {"e": float("inf"), "f": 0.0}, "g": [None]}
    assert without_missing(row) == {"a": 1, "d": {"f": 0.0}, "g": [None]}
    assert json.loads('{"x": NaN}')["x"] != 0 and without_missing(json.loads('{"x": NaN}')) == {}


@pytest.mark.parametrize(
    ("steps", "lines", "left"),
    [(0, None, []), (6, None, [0, 1, 2, 4, 5]), (6, 2, [0, 1, 5]), (9, 4, [0, 1, 2, 3, 5])],
)
def test_a_log_is_cut_back_to_a_checkpoint(tmp_path, steps, lines, left):
    rows = [{"event": f"e{n}", "steps": s} for n, s in enumerate((3, 6, 6, 9, 6))]
    rows.append({"event": "checkpoint", "steps": 6})
    path = tmp_path / EVENTS
    write(path, rows, tail='{"steps": 1')
    assert truncate_log(path, steps, lines) == len(left)
    assert read_events(tmp_path) == [rows[n] for n in left]
    assert truncate_log(tmp_path / METRICS, steps, lines) == 0


def test_what_came_before_a_checkpoint_without_steps_is_kept(tmp_path):
    rows = [{"event": "initialized", "steps": 0}, {"event": "later", "steps": 0}]
    write(tmp_path / EVENTS, rows)
    assert truncate_log(tmp_path / EVENTS, 0, 1) == 1 and read_events(tmp_path) == rows[:1]
    assert truncate_log(tmp_path / EVENTS, 0, None) == 0  # a fresh start
