"""Loss and gradient norm of a step under ZeRO-3, and of the whole model, by adaptor and stage.

usage: adaptor_gradients.py RECIPE OUT ADAPTOR…; each ADAPTOR is a value of model.adaptor. All ranks
step the same batch at learning rates of 0, so that gradients are those of the whole model that
nothing has changed. Rank 0 writes OUT: name → [by the engine, by the whole model].
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

from dsasr import recipe
from dsasr.build import Builder
from dsasr.engine import branch_engine
from dsasr.engine.branch_engine import BranchEngine, partitioner
from dsasr.model import lora
from dsasr.utils import distributed

STAGES = (
    "stages.align.trains={adaptor: 0.0}",
    "stages.joint.trains={encoder: 0.0, adaptor: 0.0, llm: 0.0}",
)


def whole(build: Builder, stage, batch) -> list[float]:
    """Loss and gradient norm without an engine."""
    model = build.speech_llm().train()
    model.requires_grad_(False)
    trained = [p for part in stage.trains for p in lora.part(model, part)]
    for parameter in trained:
        parameter.requires_grad_(True)
    outputs = model(batch)
    outputs.loss.backward()
    squares = sum(float(parameter.grad.square().sum()) for parameter in trained)
    return [float(outputs.loss.detach()), math.sqrt(squares)]


def main() -> None:
    path, out, *adaptors = (a for a in sys.argv[1:] if not a.startswith("--"))
    branch_engine.init_distributed()
    report = {}
    for number, adaptor in enumerate(adaptors):
        settings = [f"model.adaptor={adaptor}", "engine.max_grad_norm=0", *STAGES]
        cfg = recipe.load(path, settings)
        build = Builder(cfg)
        batch = distributed.broadcast(build.validation_batches("sft")[0])
        module = build.speech_llm(partitioner(cfg.engine))
        branch = BranchEngine("sft", module, cfg.engine, Path(out).parent / str(number))
        for name in ("align", "joint"):
            stage = cfg.stage(name)
            branch.enter(stage)
            step = branch.step([batch], 0)
            total, count = step.sums["nll"]
            by_engine = [float(total / count), float(step.grad_norm)]
            report[f"{adaptor} {name}"] = [by_engine, whole(build, stage, batch)]
        branch.close()
    if distributed.is_main_rank():
        Path(out).write_text(json.dumps(report))
    distributed.end_process()


main()
