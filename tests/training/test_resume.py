"""Which checkpoint a start goes on from, and when it must not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dsasr import config, recipe
from dsasr.checkpoint.manager import CheckpointManager
from dsasr.checkpoint.tensor_fragments import Fragment
from dsasr.training import resume
from dsasr.utils.errors import UserError


def saved(tiny: Path, folder: Path) -> CheckpointManager:
    """Two checkpoints of the tiny recipe."""
    chosen = recipe.load(str(tiny), [f"run={folder}", "checkpoint.keep=2"])
    kept = CheckpointManager(folder / "checkpoints", chosen.checkpoint)
    for steps in (1, 2):
        weights = {"w": Fragment((3,), 0, torch.full((3,), float(steps)))}
        kept.save(steps, weights, {"recipe": config.to_plain(chosen)})
    return kept


def choose(tiny: Path, kept: CheckpointManager, *overrides: str):
    chosen = recipe.load(str(tiny), [f"run={kept.folder.parent}", *overrides])
    reader, passed_over = resume.choose(chosen, kept)
    return (reader.manifest["steps"] if reader else None), passed_over


def test_auto_takes_the_newest_whole_one_and_a_path_takes_that_one(tiny, tmp_path):
    kept = saved(tiny, tmp_path / "run")
    first, second = kept.list()
    assert choose(tiny, kept) == (2, [])
    assert choose(tiny, kept, f"resume={first}") == (1, [])
    file = next(second.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-4])
    steps, passed_over = choose(tiny, kept)
    assert steps == 1 and second.name in passed_over[0]
    empty = CheckpointManager(tmp_path / "none" / "checkpoints", kept.config)
    assert choose(tiny, empty) == choose(tiny, empty, "resume=never") == (None, [])


def test_what_may_not_go_on_is_told_with_the_way_out(tiny, tmp_path):
    kept = saved(tiny, tmp_path / "run")
    with pytest.raises(UserError, match=r"holds a run already.*run=FOLDER"):
        choose(tiny, kept, "resume=never")
    with pytest.raises(UserError, match=r"resume=.*nowhere"):
        choose(tiny, kept, f"resume={tmp_path / 'nowhere'}")
    changed = "model.encoder.dropout=0.3"
    with pytest.raises(UserError, match=r"model\.encoder\.dropout: 0\.1 → 0\.3.*allow_changed"):
        choose(tiny, kept, changed)
    assert choose(tiny, kept, changed, "allow_changed=true") == (2, [])


def test_the_recipe_is_kept_in_the_runs_folder(tiny, tmp_path):
    chosen = recipe.load(str(tiny), [f"run={tmp_path / 'run'}"])
    resume.keep_recipe(chosen)
    assert (chosen.folder / "recipe.yaml").read_text() == config.dump(chosen)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        resume.keep_recipe(recipe.load(str(tiny), [f"run={tmp_path / 'file' / 'run'}"]))
