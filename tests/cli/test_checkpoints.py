"""`dsasr checkpoints list | average | compare`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dsasr.checkpoint import tensor_fragments
from dsasr.checkpoint.tensor_fragments import Fragment


@pytest.fixture
def steps(tmp_path) -> list[Path]:
    """Two checkpoints of a run, equal in one of two tensors."""
    folders = [tmp_path / "run" / "checkpoints" / f"step-{step:010d}" for step in (1, 2)]
    for value, folder in enumerate(folders):
        tensors = {"sft/llm.w": torch.full((6,), float(value)), "sft/llm.b": torch.ones(3)}
        fragments = {k: Fragment(tuple(t.shape), 0, t) for k, t in tensors.items()}
        tensor_fragments.write_folder(folder, fragments, {"steps": value})
    return folders


def test_list_names_those_that_are_torn(steps, tmp_path, command):
    done = command("checkpoints", "list", tmp_path / "run")
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 2
    torn = next(steps[1].glob("*.safetensors"))
    torn.write_bytes(torn.read_bytes()[:-1])
    done = command("checkpoints", "list", tmp_path / "run")
    assert done.returncode == 1 and done.stdout.count("BAD: ") == 1
    assert "has no checkpoints" in command("checkpoints", "list", tmp_path / "other").stderr


def test_compare_and_average(steps, tmp_path, command):
    done = command("checkpoints", "compare", *steps)
    assert done.returncode == 1 and "1 of 2 tensors are equal" in done.stdout
    assert command("checkpoints", "compare", steps[0], steps[0]).returncode == 0
    assert command("checkpoints", "average", *steps, "--to", tmp_path / "mean").returncode == 0
    assert tensor_fragments.verify(tmp_path / "mean")
    assert "--to FOLDER" in command("checkpoints", "average", *steps).stderr
