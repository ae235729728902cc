"""A log that grows while it is read."""

from __future__ import annotations

import json
import os

from dsasr.tracking.growing_log import GrowingLog


def test_whole_lines_alone_and_each_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = GrowingLog(path)
    assert not log.refresh() and log.rows == [] and "No such file" in log.problem
    path.write_bytes(b'{"steps": 1}\n{"ste')
    assert log.refresh() and log.rows == [{"steps": 1}] and log.problem == ""
    assert not log.refresh()
    with open(path, "ab") as file:
        file.write(b'ps": 2}\nnonsense\n[1]\n\xff\n{"steps": 3}\n')
    assert log.refresh() and [row["steps"] for row in log.rows] == [1, 2, 3] and log.broken == 3


def test_a_log_that_was_cut_back_is_read_anew(tmp_path):
    path, new = tmp_path / "metrics.jsonl", tmp_path / "new"
    path.write_text("".join(json.dumps({"steps": n}) + "\n" for n in range(5)))
    log = GrowingLog(path)
    log.refresh()
    new.write_text('{"steps": 0}\n{"steps": 1}\n')
    os.replace(new, path)  # as a resumed run does
    assert log.refresh() and [row["steps"] for row in log.rows] == [0, 1]
    path.write_text('{"steps": 9}\n')  # shorter, in place
    assert log.refresh() and [row["steps"] for row in log.rows] == [9]


def test_a_log_that_vanishes_keeps_its_rows(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"steps": 1}\n')
    log = GrowingLog(path)
    log.refresh()
    path.unlink()
    assert not log.refresh() and log.rows == [{"steps": 1}] and "No such file" in log.problem


def test_a_line_longer_than_a_read(tmp_path, monkeypatch):
    monkeypatch.setattr("dsasr.tracking.growing_log.CHUNK", 7)
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"text": "much longer than seven bytes"}\n{"steps": 2}\n')
    log = GrowingLog(path)
    log.refresh()
    assert [list(row) for row in log.rows] == [["text"], ["steps"]]
