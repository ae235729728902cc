"""Loss and gradient norm of a stage's step under ZeRO-3, and of the whole model.

usage: gradients.py RECIPE OUT CASE…; a CASE is JSON, [name, stages, overrides of the recipe]. All
ranks step the same batch at learning rates of 0: the gradients are those of a whole model as it was
built. Rank 0 writes OUT: "name stage" → [by the engine, by the whole model].
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import torch

from dsasr import recipe
from dsasr.build import Builder
from dsasr.engine import process_setup
from dsasr.engine.branch_engine import BranchEngine
from dsasr.engine.partitioner import partitioner
from dsasr.model import lora
from dsasr.utils import distributed


def first_mean(sums: dict) -> float:
    total, count = next(iter(sums.values()))
    return float(total / count)


def whole(build: Builder, stage, batch) -> list[float]:
    """Loss and gradient norm without an engine."""
    model = build.module(stage.branch).train()
    if stage.branch == "pretrain":
        model.warm_up(0, stage.warmup_steps)  # as at the engine's first step
    model.requires_grad_(False)
    trained = [p for part in stage.trains for p in lora.part(model, part)]
    for parameter in trained:
        parameter.requires_grad_(True)
    outputs = model(batch)
    outputs.loss.backward()
    squares = sum(float(parameter.grad.square().sum()) for parameter in trained)
    return [first_mean(outputs.sums), math.sqrt(squares)]


def main() -> None:
    path, out, *cases = (a for a in sys.argv[1:] if not a.startswith("--"))
    process_setup.init_distributed()
    # B is zero at first, and so is A's gradient.
    lora.initial = lambda name, shape, generator: 0.1 * torch.randn(shape, generator=generator)
    report = {}
    for case in cases:
        name, stages, overrides = json.loads(case)
        cfg = recipe.load(path, ["engine.max_grad_norm=0", *overrides])
        build, engines = Builder(cfg), {}
        for stage in map(cfg.stage, stages):
            if stage.branch not in engines:
                module = build.module(stage.branch, partitioner(cfg.engine))
                engines[stage.branch] = BranchEngine(
                    stage.branch, module, cfg.engine, Path(out).parent / name
                )
            branch = engines[stage.branch]
            batch = distributed.broadcast(build.validation_batches(stage.branch)[0])
            branch.enter(stage)
            step = branch.step([batch], 0)
            by_engine = [first_mean(step.sums), float(step.grad_norm)]
            report[f"{name} {stage.name}"] = [by_engine, whole(build, stage, batch)]
        for branch in engines.values():
            branch.close()
    if distributed.is_main_rank():
        Path(out).write_text(json.dumps(report))
    distributed.end_process()


main()
