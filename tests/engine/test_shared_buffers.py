"""What DeepSpeed's ranks on a CPU leave in /dev/shm. That a job leaves nothing is also tested in
test_master_weights.py."""

from __future__ import annotations

import os

from dsasr.engine import shared_buffers


def test_only_buffers_that_no_process_has_open_are_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(shared_buffers, "FOLDER", tmp_path)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    start, user = "deepspeed_allreduce_buffer_", os.getuid()
    left = [f"{start}{user}_127.0.0.1_40001_0", f"{start}{user}_127.0.0.1_40001_13"]
    kept = [f"{start}{user}_127.0.0.1_29500_1", f"{start}{user + 1}_127.0.0.1_40001_0", "other"]
    used = f"{start}{user}_127.0.0.1_40002_0"
    for name in (*left, *kept, used):
        (tmp_path / name).write_bytes(b"x")
    with open(tmp_path / used, "rb"):
        shared_buffers.unlink_left()
        assert {p.name for p in tmp_path.iterdir()} == {*kept, used}
    shared_buffers.unlink_left()
    assert {p.name for p in tmp_path.iterdir()} == set(kept)
    own = tmp_path / f"{start}{user}_127.0.0.1_29500_0"
    own.write_bytes(b"x")
    for _ in range(2):
        shared_buffers.unlink_own()
    assert {p.name for p in tmp_path.iterdir()} == set(kept)
