from __future__ import annotations

import resource
import time

import pytest
import torch

from dsasr.checkpoint import CheckpointConfig, Checkpoints
from dsasr.errors import UserError
from dsasr.fragments import Fragment


def held(value: float, size: int = 10) -> dict[str, Fragment]:
    return {"w": Fragment((size,), 0, torch.full((size,), value))}


def test_the_newest_whole_one_is_chosen_and_the_others_named(tmp_path):
    saved = Checkpoints(tmp_path, CheckpointConfig(keep=3))
    for step in (5, 10, 15):
        saved.save(step, held(float(step)), {"progress": step})
    reader, passed_over = saved.newest()
    assert reader.manifest["progress"] == 15 and not passed_over
    path = tmp_path / "step-0000000015" / "rank-00000.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    reader, passed_over = saved.newest()
    assert torch.equal(reader.whole("w"), torch.full((10,), 10.0))
    assert len(passed_over) == 1 and "step-0000000015" in passed_over[0]


def test_old_ones_go_only_after_the_new_one_is_there(tmp_path):
    saved = Checkpoints(tmp_path, CheckpointConfig(keep=2))
    for step in range(1, 5):
        saved.save(step, held(step), {})
    assert [p.name[-1] for p in saved.list()] == ["3", "4"]


def test_a_full_disk_keeps_the_last_good_one(tmp_path):
    saved = Checkpoints(tmp_path, CheckpointConfig(keep=1, every_minutes=1))
    saved.save(1, held(1.0), {})
    saved._saved_at = time.monotonic() - 100
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        assert saved.due(2)
        with pytest.raises(OSError, match="could not write"):
            saved.save(2, held(2.0, 100_000), {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    reader, passed_over = saved.newest()
    assert reader.manifest["steps"] == 1 and not passed_over
    assert [p.name for p in tmp_path.iterdir()] == ["step-0000000001"]
    assert not saved.due(3), "a full disk must not be tried again at every step"


def test_due_by_steps_and_by_time(tmp_path):
    by_steps = Checkpoints(tmp_path, CheckpointConfig(every_steps=4, every_minutes=0))
    assert [s for s in range(1, 13) if by_steps.due(s)] == [4, 8, 12]
    never = Checkpoints(tmp_path, CheckpointConfig(every_steps=0, every_minutes=0))
    assert not any(never.due(s) for s in range(1, 100))
    by_time = Checkpoints(tmp_path, CheckpointConfig(every_minutes=1))
    assert not by_time.due(1)
    by_time._saved_at -= 61
    assert by_time.due(1)
    with pytest.raises(UserError, match="at least 1"):
        CheckpointConfig(keep=0)


def test_an_empty_folder_has_nothing_to_resume(tmp_path):
    assert Checkpoints(tmp_path / "none", CheckpointConfig()).newest() == (None, [])
