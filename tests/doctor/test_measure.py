"""Measurements of one rank: rates of disks, and ends to what hangs."""

from __future__ import annotations

import os
import threading
import time

import pytest

from dsasr.data.shards.storage import ShardStorage
from dsasr.doctor import measure


def test_an_end_to_what_hangs():
    started, ended = time.monotonic(), threading.Event()
    with pytest.raises(TimeoutError, match=r"no answer within 0\.1 s"):
        measure.within(0.1, ended.wait)
    ended.set()
    assert time.monotonic() - started < 5
    assert measure.within(5, lambda: 3) == 3
    with pytest.raises(KeyError):
        measure.within(5, lambda: {}["x"])


def test_what_is_written_is_gone_afterwards(tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "WRITE_BYTES", 20 * measure.MIB)
    monkeypatch.setattr(measure, "WRITE_SECONDS", 60.0)
    written = measure.write(tmp_path / "not" / "yet")
    assert written.problem == "" and written.bytes == 24 * measure.MIB and written.seconds > 0
    assert list(tmp_path.iterdir()) == [] and measure.free_bytes(tmp_path / "not") > 0


def test_a_folder_that_cannot_be_written_says_why(tmp_path, monkeypatch):
    def refuse(**_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(measure.tempfile, "NamedTemporaryFile", refuse)
    assert "Read-only file system" in measure.write(tmp_path).problem


def test_shards_are_read_to_their_ends_or_to_the_limit(tmp_path, monkeypatch):
    for name, size in (("a.tar", 2_500_000), ("b.tar", 100)):
        (tmp_path / name).write_bytes(os.urandom(size))
    monkeypatch.setattr(measure, "READ_SECONDS", 60.0)
    names = [str(tmp_path / "a.tar"), "pipe:false", str(tmp_path / "b.tar")]
    done = measure.read(names, ShardStorage())
    assert done.problem == "" and done.bytes == 2_500_100
    monkeypatch.setattr(measure, "READ_BYTES", measure.MIB)
    assert measure.read(names[:1], ShardStorage()).bytes == measure.MIB
    assert "No such file" in measure.read([str(tmp_path / "c.tar")], ShardStorage()).problem
    assert measure.read([], ShardStorage()).bytes == 0


def test_one_rank_agrees_with_itself(tmp_path):
    assert measure.clock_offset() == 0.0 and measure.all_reduce() == 0.0
    assert measure.sees_folder(tmp_path) and list(tmp_path.iterdir()) == []
    assert measure.products(0.01) > 0
