"""Restoring a model from a run folder: the newest checkpoint, or one by name or path."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from dsasr import config, recipe
from dsasr.build import Builder
from dsasr.checkpoint import tensor_fragments
from dsasr.checkpoint.manifest import FORMAT, MANIFEST
from dsasr.checkpoint.tensor_fragments import Fragment
from dsasr.inference.model_from_run import RunModel, run_recipe
from dsasr.utils.errors import UserError

ROOT = Path(__file__).parents[2]
OLD, NEW, TORN = (f"step-{steps:010d}" for steps in (10, 20, 30))


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory) -> Path:
    """Two whole checkpoints, with a fresh model's weights plus 1 and plus 2, and a torn third."""
    folder = tmp_path_factory.mktemp("recognizer") / "run"
    cfg = recipe.load(str(tiny), [f"run={folder}"])
    model = Builder(cfg).speech_llm()
    for number, name in enumerate((OLD, NEW, TORN), 1):
        checkpoint = folder / "checkpoints" / name
        checkpoint.mkdir(parents=True)
        fragments = {
            f"sft/{key}": Fragment(tuple(weight.shape), 0, weight.detach().reshape(-1) + number)
            for key, weight in model.named_parameters()
        }
        files = {
            "rank-00000.safetensors": tensor_fragments.write_file(
                checkpoint / "rank-00000.safetensors", fragments
            )
        }
        manifest = {"format": FORMAT, "steps": 10 * number, "files": files}
        (checkpoint / MANIFEST).write_text(json.dumps(manifest))
    with open(checkpoint / "rank-00000.safetensors", "r+b") as file:
        file.seek(-4, 2)
        file.write(b"torn")
    (folder / "recipe.yaml").write_text(config.dump(cfg))
    return folder


def test_the_newest_checkpoint_or_the_named_one_is_loaded(run):
    newest = RunModel.from_run(run)
    assert newest.checkpoint.name == NEW
    for checkpoint in (OLD, str(run / "checkpoints" / OLD)):
        older = RunModel.from_run(run, checkpoint)
        assert older.checkpoint == run / "checkpoints" / OLD
        pairs = zip(newest.model.parameters(), older.model.parameters(), strict=True)
        assert all(torch.allclose(a, b + 1, atol=1e-5) for a, b in pairs)


def test_a_job_of_a_concurrent_run_knows_its_folder_and_the_snapshots(tiny, tmp_path):
    for branch in ("sft", "pretrain", "both"):
        cfg = recipe.load(str(tiny), [f"run={tmp_path / 'before'}", f"branch={branch}"])
        folder = tmp_path / "moved" / branch
        folder.mkdir(parents=True)
        (folder / "recipe.yaml").write_text(config.dump(cfg))
        restored = run_recipe(folder)
        home = folder if branch == "both" else tmp_path / "moved"
        assert restored.folder == folder and restored.store_folder == home / "snapshots"


def test_the_error_of_a_missing_or_torn_checkpoint_names_the_others(run):
    with pytest.raises(UserError, match=f"no checkpoint step-5; .*{OLD}, {NEW}, {TORN}"):
        RunModel.from_run(run, "step-5")
    with pytest.raises(UserError, match=f"{TORN} is not whole: .*altered.*{OLD}, {NEW}"):
        RunModel.from_run(run, TORN)


def test_evaluation_of_an_earlier_checkpoint(run, tiny, tmp_path, command):
    arguments = [run, "--data", tiny.parent / "valid", "--limit", 2, "--checkpoint", OLD]
    done = command("evaluate", *arguments, "--out", tmp_path / "rows.jsonl")
    assert done.returncode == 0, done.stderr
    assert f"checkpoints/{OLD})" in done.stdout
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == 2
    refused = command("evaluate", *arguments, "--report")
    assert refused.returncode == 2 and "--out" in refused.stderr
    assert not (run / "report.json").exists()
