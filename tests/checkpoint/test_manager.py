from __future__ import annotations

import resource
import time

import pytest
import torch

from dsasr.checkpoint import async_writer, tensor_fragments
from dsasr.checkpoint.manager import CheckpointConfig, CheckpointManager, kept_by
from dsasr.checkpoint.tensor_fragments import Fragment
from dsasr.utils.errors import UserError


def held(value: float, size: int = 10) -> dict[str, Fragment]:
    return {"w": Fragment((size,), 0, torch.full((size,), value))}


def test_the_newest_whole_one_is_chosen_and_the_others_named(tmp_path):
    saved = CheckpointManager(tmp_path, CheckpointConfig(keep=3))
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
    saved = CheckpointManager(tmp_path, CheckpointConfig(keep=2))
    for step in range(1, 5):
        saved.save(step, held(step), {})
    assert [p.name[-1] for p in saved.list()] == ["3", "4"]


def test_a_full_disk_keeps_the_last_good_one(tmp_path):
    saved = CheckpointManager(tmp_path, CheckpointConfig(keep=1, every_minutes=1))
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


def until_saved(saved: CheckpointManager):
    end = time.monotonic() + 30
    while not (found := saved.finished_saves()):
        assert time.monotonic() < end
        time.sleep(0.01)
    return found


def test_training_waits_for_a_copy_and_not_for_the_disk(tmp_path, slow_disk):
    saved = CheckpointManager(tmp_path, CheckpointConfig(keep=1))
    weights = torch.ones(1000)
    started = time.monotonic()
    target = saved.save(1, {"w": Fragment((1000,), 0, weights)}, {"list": [1]}, wait=False)
    assert time.monotonic() - started < 0.25
    weights.zero_()  # the next optimizer step
    assert not target.exists() and saved.finished_saves() == []
    (result,) = until_saved(saved)
    assert result.failure is None and result.seconds > 0.4 and result.stall < 0.25
    reader, _ = saved.newest()
    assert torch.equal(reader.whole("w"), torch.ones(1000)) and reader.manifest["list"] == [1]
    assert [p.name for p in tmp_path.iterdir()] == ["step-0000000001"]


def test_the_next_one_waits_for_the_one_before(tmp_path, slow_disk):
    saved = CheckpointManager(tmp_path, CheckpointConfig(keep=5))
    for step in (1, 2):
        saved.save(step, held(step), {}, wait=False)
    assert [p.name[-1] for p in saved.list()] == ["1"]
    saved.save(3, held(3), {})
    assert [p.name[-1] for p in saved.list()] == ["1", "2", "3"]
    assert [one.steps for one in saved.finished_saves()] == [1, 2, 3]


def test_a_run_that_ends_badly_still_gets_what_was_being_written(tmp_path, slow_disk):
    saved = CheckpointManager(tmp_path, CheckpointConfig())
    saved.save(1, held(1), {}, wait=False)
    saved.close()
    assert saved.newest()[0].manifest["steps"] == 1 and saved.finished_saves()[0].failure is None


def test_a_disk_that_is_full_in_the_background_is_told_later(tmp_path, monkeypatch):
    saved = CheckpointManager(tmp_path, CheckpointConfig(keep=1))
    saved.save(1, held(1), {})

    def full(*_args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(tensor_fragments, "write_file", full)
        saved.save(2, held(2), {}, wait=False)
        first, second = until_saved(saved) if len(saved._landed) > 1 else (
            *saved.finished_saves(), *until_saved(saved)
        )  # fmt: skip
        assert first.failure is None and "No space left" in second.failure
    saved.save(3, held(3), {})
    assert [p.name[-1] for p in saved.list()] == ["3"]
    assert not list(tmp_path.glob(".*"))


def test_remains_of_killed_jobs_go(tmp_path):
    remains = tmp_path / ".step-0000000009.tmp"
    remains.mkdir()
    (remains / "rank-00000.safetensors").write_bytes(b"half")
    saved = CheckpointManager(tmp_path, CheckpointConfig())
    assert saved.list() == [] and saved.newest() == (None, [])
    saved.save(1, held(1), {})
    assert [p.name for p in tmp_path.iterdir()] == ["step-0000000001"]


def test_another_rank_that_cannot_write_leaves_nothing(tmp_path, monkeypatch):
    """Rank 0 of two, with the other's note written here."""
    monkeypatch.setattr(async_writer.distributed, "world_size", lambda: 2)
    monkeypatch.setattr(async_writer.distributed, "broadcast", lambda value: value)
    monkeypatch.setattr(async_writer.distributed, "all_gather_object", lambda value: [value, None])
    write = async_writer.AsyncFolderWriter(tmp_path / "step-1", held(1), {})
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
    saved = CheckpointManager(tmp_path, config)
    for step, score in ((1, 0.5), (2, 0.2), (3, None), (4, 0.4)):
        saved.save(step, held(step), {}, score)
    assert [p.name[-1] for p in saved.list()] == ["2", "4"]
    CheckpointManager(tmp_path, config).save(5, held(5), {}, 0.3)
    assert [p.name[-1] for p in saved.list()] == ["2", "5"]


def test_a_deleted_shard_and_a_flipped_bit_leave_the_one_before(tmp_path):
    saved = CheckpointManager(tmp_path, CheckpointConfig(keep=4))
    for step in (1, 2, 3):
        saved.save(step, held(step), {})
    path = tmp_path / "step-0000000003" / "rank-00000.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 4
    path.write_bytes(data)
    (tmp_path / "step-0000000002" / "rank-00000.safetensors").unlink()
    reader, reasons = saved.newest()
    assert reader.manifest["steps"] == 1
    assert "sha256" in reasons[0] and "lacks rank-00000" in reasons[1]
