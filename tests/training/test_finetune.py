"""A model trained, exported and fine-tuned with the packaged recipe, under ZeRO-3 on two ranks."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest
import torch

from dsasr.checkpoint.locate import open_checkpoint, open_run_checkpoint
from dsasr.inference import export
from dsasr.inference.model_from_run import RunModel, run_recipe
from dsasr.tracking.run_log import read_events, read_metrics

TRAIN = Path(__file__).parents[2] / "dsasr" / "train.py"
# Steps at rate zero first: what they save is what the run started with.
STAGES = (
    "stages=[{name: still, branch: sft, trains: {adaptor: 0.0, lora: 0.0}, steps: 1},"
    " {name: adapt, branch: sft, trains: {adaptor: 1.0e-3, lora: 1.0e-3}, steps: 3}]"
)


@pytest.mark.slow
@pytest.mark.launcher
def test_trained_exported_and_fine_tuned(launch, tiny, tmp_path, command):
    run, model, tuned = tmp_path / "run", tmp_path / "model", tmp_path / "tuned"
    short = ["stages.pretrain.steps=4", "stages.align.steps=1", "stages.ia_sft.steps=2",
             "stages.ia_sft.steps_after_final_swap=1", "stages.joint.steps=2",
             "drift.mode=final"]  # fmt: skip
    done = launch(TRAIN, "--recipe", tiny, f"run={run}", *short)
    assert done.returncode == 0, done.stdout[-3000:]
    done = command("export", run, "--to", model)
    assert done.returncode == 0, done.stderr
    shards = [f"data.train.own.shards={tiny.parent / 'train'}",
              f"data.valid.own-valid.shards={tiny.parent / 'valid'}"]  # fmt: skip
    few = ["data.dataloader={num_workers: 0, batch: {frames: 400, min_seconds: 0.05}}", STAGES,
           "evaluation={decode: {max_tokens: 8}}", "monitor={every: 1, tensorboard: false}",
           "checkpoint={every_steps: 1, keep: 9}", "engine.precision=bf16"]  # fmt: skip
    done = launch(TRAIN, "--recipe", "finetune", f"run={tuned}", f"model.init_from={model}",
                  *shards, *few)  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    assert done.stdout.count("initial weights from") == 1  # by rank 0 alone
    started, ended = (
        open_checkpoint(tuned / "checkpoints" / f"step-{steps:010d}") for steps in (1, 4)
    )
    exported = export.load_export(model).model.state_dict()
    for name, tensor in exported.items():
        key = f"sft/{name}"
        if key not in started:  # a tied head
            continue
        assert torch.equal(started.whole(key), tensor.bfloat16()), name
        moved = not torch.equal(ended.whole(key), tensor.bfloat16())
        assert moved == name.startswith("adaptor."), name
        # The master of what trains is the float32 weight, not the rounded one.
        assert (f"sft/master/{name}" in started) == name.startswith("adaptor.")
        if name.startswith("adaptor."):
            assert torch.equal(started.whole(f"sft/master/{name}"), tensor), name
    matrices = [k for k in started.shapes if k.startswith("sft/llm.") and "lora_B" in k]
    assert matrices and all(not started.whole(key).any() for key in matrices)
    assert any(ended.whole(key).any() for key in matrices)
    assert all(math.isfinite(line["nll"]) for line in read_metrics(tuned) if "nll" in line)
    kinds = [e["event"] for e in read_events(tuned)]
    assert kinds.count("initialized") == 1 and kinds[-1] == "finished"
    # What was fine-tuned is whole without what it started from, and can be exported in turn.
    shutil.rmtree(model)
    shutil.rmtree(run)
    restored = RunModel.from_run(tuned)
    again = export.export_run(restored.builder, open_run_checkpoint(tuned), tmp_path / "again")
    assert export.read_config(again).adaptor == run_recipe(tuned).model.adaptor
