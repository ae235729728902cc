"""Finding a run's checkpoints, and opening them verified."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dsasr.checkpoint import locate, tensor_fragments
from dsasr.checkpoint.tensor_fragments import Fragment, FragmentError
from dsasr.utils.errors import UserError


def write(folder: Path, steps: int, torn: bool = False) -> Path:
    path = folder / locate.checkpoint_name(steps)
    fragments = {"w": Fragment((4,), 0, torch.full((4,), float(steps)))}
    tensor_fragments.write_folder(path, fragments, {"steps": steps})
    if torn:
        file = path / "rank-00000.safetensors"
        file.write_bytes(file.read_bytes()[:-1])
    return path


@pytest.mark.parametrize("job", ["", "sft", "pretrain"])
def test_the_newest_whole_one_of_a_run_or_of_one_of_its_jobs(tmp_path, job):
    folder = tmp_path / job / "checkpoints"
    for steps in (9, 10, 20):
        write(folder, steps, torn=steps == 20)
    assert locate.checkpoint_folder(tmp_path) == folder
    assert [path.name[-2:] for path in locate.list_checkpoints(folder)] == ["09", "10", "20"]
    path, problems = locate.newest_whole(folder)
    assert path.name == "step-0000000010" and "step-0000000020" in problems[0]
    assert locate.open_run_checkpoint(tmp_path).manifest["steps"] == 10
    assert locate.open_run_checkpoint(tmp_path, "step-0000000009").manifest["steps"] == 9


def test_a_concurrent_runs_sft_job_goes_first_and_its_folder_is_a_runs(tmp_path):
    assert not locate.is_run(tmp_path)
    for job in ("pretrain", "sft"):
        write(tmp_path / job / "checkpoints", 3)
        (tmp_path / job / "recipe.yaml").touch()
        assert locate.is_run(tmp_path) and locate.is_run(tmp_path / job)
        assert locate.checkpoint_folder(tmp_path) == tmp_path / job / "checkpoints"


def test_one_by_path(tmp_path):
    path = write(tmp_path / "elsewhere", 3)
    assert locate.open_run_checkpoint(tmp_path / "run", str(path)).manifest["steps"] == 3
    assert locate.open_checkpoint(path).manifest["steps"] == 3


def test_what_is_missing_or_torn_is_named(tmp_path):
    with pytest.raises(UserError, match="no whole checkpoint: train it"):
        locate.open_run_checkpoint(tmp_path)
    torn = write(tmp_path / "checkpoints", 5, torn=True)
    with pytest.raises(UserError, match=r"no whole checkpoint: .*altered"):
        locate.open_run_checkpoint(tmp_path)
    with pytest.raises(UserError, match=r"is not whole: .*altered.* has step-0000000005"):
        locate.open_run_checkpoint(tmp_path, torn.name)
    with pytest.raises(UserError, match=r"no checkpoint x; .* has step-0000000005"):
        locate.open_run_checkpoint(tmp_path, "x")
    with pytest.raises(UserError, match=r"altered.*another checkpoint"):
        locate.open_checkpoint(torn)
    with pytest.raises(FragmentError, match="altered"):
        locate.open_verified(torn)
    assert locate.list_checkpoints(tmp_path / "none") == []
