"""Saving, listing and pruning checkpoints."""

from __future__ import annotations

import resource
import time

import pytest
import torch

from dsasr.checkpoint import async_writer, tensor_fragments
from dsasr.checkpoint.manager import CheckpointConfig, CheckpointManager, kept_by
from dsasr.checkpoint.tensor_fragments import Fragment
from dsasr.utils.errors import UserError


def fragments(value: float, size: int = 10) -> dict[str, Fragment]:
    return {"w": Fragment((size,), 0, torch.full((size,), value))}


def test_the_newest_whole_one_is_opened_and_the_others_are_named(tmp_path):
    manager = CheckpointManager(tmp_path, CheckpointConfig(keep=3))
    for step in (5, 10, 15):
        manager.save(step, fragments(float(step)), {"progress": {"sft": step}})
    reader, passed_over = manager.newest()
    assert reader.manifest["progress"] == {"sft": 15} and not passed_over
    path = tmp_path / "step-0000000015" / "rank-00000.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    reader, passed_over = manager.newest()
    assert torch.equal(reader.whole("w"), torch.full((10,), 10.0))
    assert len(passed_over) == 1 and "step-0000000015" in passed_over[0]


def test_old_ones_are_pruned_only_after_the_new_one_is_published(tmp_path):
    manager = CheckpointManager(tmp_path, CheckpointConfig(keep=2))
    for step in range(1, 5):
        manager.save(step, fragments(step), {})
    assert [p.name[-1] for p in manager.list()] == ["3", "4"]


def test_a_full_disk_keeps_the_last_good_one(tmp_path):
    manager = CheckpointManager(tmp_path, CheckpointConfig(keep=1, every_minutes=1))
    manager.save(1, fragments(1.0), {})
    manager._saved_at = time.monotonic() - 100
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        assert manager.due(2)
        with pytest.raises(OSError, match="could not write"):
            manager.save(2, fragments(2.0, 100_000), {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    reader, passed_over = manager.newest()
    assert reader.manifest["steps"] == 1 and not passed_over
    assert [p.name for p in tmp_path.iterdir()] == ["step-0000000001"]
    assert not manager.due(3), "a full disk must not be tried again at every step"


def test_due_by_steps_and_by_time(tmp_path):
    by_steps = CheckpointManager(tmp_path, CheckpointConfig(every_steps=4, every_minutes=0))
    assert [s for s in range(1, 13) if by_steps.due(s)] == [4, 8, 12]
    never = CheckpointManager(tmp_path, CheckpointConfig(every_steps=0, every_minutes=0))
    assert not any(never.due(s) for s in range(1, 100))
    by_time = CheckpointManager(tmp_path, CheckpointConfig(every_minutes=1))
    assert not by_time.due(1)
    by_time._saved_at -= 61
    assert by_time.due(1)
    with pytest.raises(UserError, match="at least 1"):
        CheckpointConfig(keep=0)


def test_before_an_evaluation_a_tenth_of_an_interval_is_enough(tmp_path):
    by_steps = CheckpointManager(tmp_path, CheckpointConfig(every_steps=40, every_minutes=0))
    assert [s for s in range(1, 9) if by_steps.due_early(s)] == [4, 5, 6, 7, 8]
    by_steps.save(8, fragments(8.0), {})
    assert [s for s in range(9, 15) if by_steps.due_early(s)] == [12, 13, 14]
    by_time = CheckpointManager(tmp_path, CheckpointConfig(every_minutes=10))
    assert not by_time.due_early(1)
    by_time._saved_at -= 61
    assert by_time.due_early(1) and not by_time.due(1)
    never = CheckpointManager(tmp_path, CheckpointConfig(every_steps=0, every_minutes=0))
    assert not any(never.due_early(s) for s in range(1, 100))


def test_an_empty_folder_has_nothing_to_resume(tmp_path):
    assert CheckpointManager(tmp_path / "none", CheckpointConfig()).newest() == (None, [])


# -- while training goes on --------------------------------------------------------------------


@pytest.fixture
def slow_disk(monkeypatch):
    """Writing takes half a second."""
    write = tensor_fragments.write_file

    def slowly(path, tensors):
        time.sleep(0.5)
        return write(path, tensors)

    monkeypatch.setattr(tensor_fragments, "write_file", slowly)


def wait_for_saves(manager: CheckpointManager):
    end = time.monotonic() + 30
    while not (results := manager.finished_saves()):
        assert time.monotonic() < end
        time.sleep(0.01)
    return results


def test_training_waits_for_a_copy_and_not_for_the_disk(tmp_path, slow_disk):
    manager = CheckpointManager(tmp_path, CheckpointConfig(keep=1))
    weights = torch.ones(1000)
    started = time.monotonic()
    target = manager.save(1, {"w": Fragment((1000,), 0, weights)}, {"list": [1]}, wait=False)
    assert time.monotonic() - started < 0.25
    weights.zero_()  # the next optimizer step
    assert not target.exists() and manager.finished_saves() == []
    (result,) = wait_for_saves(manager)
    assert result.failure is None and result.seconds > 0.4 and result.stall < 0.25
    reader, _ = manager.newest()
    assert torch.equal(reader.whole("w"), torch.ones(1000)) and reader.manifest["list"] == [1]
    assert [p.name for p in tmp_path.iterdir()] == ["step-0000000001"]


def test_the_next_one_waits_for_the_one_before(tmp_path, slow_disk):
    manager = CheckpointManager(tmp_path, CheckpointConfig(keep=5))
    for step in (1, 2):
        manager.save(step, fragments(step), {}, wait=False)
    assert [p.name[-1] for p in manager.list()] == ["1"]
    manager.save(3, fragments(3), {})
    assert [p.name[-1] for p in manager.list()] == ["1", "2", "3"]
    assert [result.steps for result in manager.finished_saves()] == [1, 2, 3]


def test_close_waits_for_the_write_in_progress(tmp_path, slow_disk):
    manager = CheckpointManager(tmp_path, CheckpointConfig())
    manager.save(1, fragments(1), {}, wait=False)
    manager.close()
    assert manager.newest()[0].manifest["steps"] == 1
    assert manager.finished_saves()[0].failure is None


def test_a_full_disk_in_the_background_is_reported_later(tmp_path, monkeypatch):
    manager = CheckpointManager(tmp_path, CheckpointConfig(keep=1))
    manager.save(1, fragments(1), {})

    def full(*_args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(tensor_fragments, "write_file", full)
        manager.save(2, fragments(2), {}, wait=False)
        first, *rest = manager.finished_saves()
        (second,) = rest or wait_for_saves(manager)
        assert first.failure is None and "No space left" in second.failure
    manager.save(3, fragments(3), {})
    assert [p.name[-1] for p in manager.list()] == ["3"]
    assert not list(tmp_path.glob(".*"))


def test_temporaries_of_killed_jobs_are_removed(tmp_path):
    torn = tmp_path / ".step-0000000009.tmp"
    torn.mkdir()
    (torn / "rank-00000.safetensors").write_bytes(b"half")
    manager = CheckpointManager(tmp_path, CheckpointConfig())
    assert manager.list() == [] and manager.newest() == (None, [])
    manager.save(1, fragments(1), {})
    assert [p.name for p in tmp_path.iterdir()] == ["step-0000000001"]


def test_another_rank_that_cannot_write_leaves_nothing(tmp_path, monkeypatch):
    """Rank 0 of two; this test writes the note of rank 1."""
    monkeypatch.setattr(async_writer.distributed, "world_size", lambda: 2)
    monkeypatch.setattr(async_writer.distributed, "broadcast", lambda value: value)
    monkeypatch.setattr(async_writer.distributed, "all_gather_object", lambda value: [value, None])
    write = async_writer.AsyncFolderWriter(tmp_path / "step-1", fragments(1), {})
    note = tmp_path / ".step-1.tmp" / "rank-00001.note"
    note.write_text('{"name": "rank-00001.safetensors", "failure": "rank 1: No space left"}')
    with pytest.raises(OSError, match="rank 1: No space left"):
        write.wait()
    assert not list(tmp_path.iterdir())


# -- which to keep -----------------------------------------------------------------------------


def test_kept_by_number_hours_and_score():
    hour = 3600.0
    inf = float("inf")
    marks = [(n * 0.5 * hour, inf) for n in range(10)]  # one every half hour
    assert kept_by(CheckpointConfig(keep=2), marks) == {8, 9}
    assert kept_by(CheckpointConfig(keep=2, keep_hours=2), marks) == {0, 4, 8, 9}
    scores = {2: 0.30, 5: 0.10, 6: 0.20, 7: 0.10}
    marks = [(t, scores.get(n, inf)) for n, (t, _) in enumerate(marks)]
    # Of equal scores the newer one.
    assert kept_by(CheckpointConfig(keep=1, keep_best=1), marks) == {7, 9}
    assert kept_by(CheckpointConfig(keep=1, keep_best=3), marks) == {5, 6, 7, 9}
    assert kept_by(CheckpointConfig(keep=3), []) == set()
    for bad in ({"keep_hours": -1.0}, {"keep_best": -1}):
        with pytest.raises(UserError):
            CheckpointConfig(**bad)


def test_the_best_one_survives_on_disk_and_over_a_restart(tmp_path):
    config = CheckpointConfig(keep=1, keep_best=1)
    manager = CheckpointManager(tmp_path, config)
    for step, score in ((1, 0.5), (2, 0.2), (3, None), (4, 0.4)):
        manager.save(step, fragments(step), {}, score)
    assert [p.name[-1] for p in manager.list()] == ["2", "4"]
    CheckpointManager(tmp_path, config).save(5, fragments(5), {}, 0.3)
    assert [p.name[-1] for p in manager.list()] == ["2", "5"]


def test_a_deleted_shard_and_a_flipped_bit_leave_the_one_before(tmp_path):
    manager = CheckpointManager(tmp_path, CheckpointConfig(keep=4))
    for step in (1, 2, 3):
        manager.save(step, fragments(step), {})
    path = tmp_path / "step-0000000003" / "rank-00000.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 4
    path.write_bytes(data)
    (tmp_path / "step-0000000002" / "rank-00000.safetensors").unlink()
    reader, reasons = manager.newest()
    assert reader.manifest["steps"] == 1
    assert "sha256" in reasons[0] and "lacks rank-00000" in reasons[1]
