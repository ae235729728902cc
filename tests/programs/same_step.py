"""The first update of a step that is shared unevenly, and of one batch on one rank.

usage: same_step.py RECIPE OUT. Eight utterances are shared among ranks and micro-batches so that
their targets are not: the last rank's last micro-batch has none where there is more than one. Rank
0 writes OUT: case → the largest difference of a weight from a plain AdamW step on one batch of all
utterances, the largest change of a weight, and the difference of loss and gradient norm.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import torch
from torch import Tensor

from dsasr import recipe
from dsasr.build import Builder
from dsasr.checkpoint import zero_partition
from dsasr.data.batch import Batch
from dsasr.engine import process_setup
from dsasr.engine.branch_engine import BranchEngine
from dsasr.engine.partitioner import partitioner
from dsasr.model import lora
from dsasr.utils import distributed

RATE = 1e-2
QUIET = [
    "model.encoder.dropout=0",
    "model.pretrain.spec=null",
    "model.pretrain.chunks=null",
    "model.sft.spec=false",
    "engine.max_grad_norm=0.5",
    "engine.eps=1e-4",  # the update of a weight without a gradient would be rounding alone
]
# name: stage, micro-batches of a rank
CASES = {
    "ctc": ("pretrain", 1),
    "ctc accumulated": ("pretrain", 2),
    "align": ("align", 1),
    "joint": ("joint", 1),
    "joint accumulated": ("joint", 3),
}


FRAMES = (160, 44, 131, 60, 52, 97, 40, 75)
PHONEMES = (17, 2, 5, 6, 1, 11, 17, 3)
TOKENS = (9, 1, 14, 2, 3, 12, 2, 4)


def utterances(bins: int) -> Batch:
    """Noise with labels of very different lengths; one has too few frames for its phonemes."""
    draw = torch.Generator().manual_seed(3)
    count = len(FRAMES)
    return Batch.blank(
        torch.randn(count, max(FRAMES), bins, generator=draw),
        feature_lengths_B=torch.tensor(FRAMES),
        phonemes_BP=torch.randint(1, 9, (count, max(PHONEMES)), generator=draw),
        phoneme_lengths_B=torch.tensor(PHONEMES),
        tokens_BU=torch.randint(4, 200, (count, max(TOKENS)), generator=draw),
        token_lengths_B=torch.tensor(TOKENS),
        keys=tuple(f"utterance-{i}" for i in range(count)),
    )


def rows(batch: Batch, index: list[int]) -> Batch:
    """Some utterances of a batch, with as much padding as they need."""
    taken = {}
    for name in ("features_BTF", "phonemes_BP", "tokens_BU"):
        values = getattr(batch, name)[index]
        lengths = "feature" if name == "features_BTF" else name.split("s_")[0]
        lengths_B = getattr(batch, f"{lengths}_lengths_B")[index]
        taken[name] = values[:, : int(lengths_B.max()) if index else 0]
        taken[f"{lengths}_lengths_B"] = lengths_B
    keys = tuple(batch.keys[i] for i in index)
    return dataclasses.replace(batch, **taken, keys=keys)


def shares(count: int, parts: int) -> list[list[int]]:
    """Utterances of each micro-batch: half of what is left each time, and none in the last."""
    left, found = list(range(count)), []
    for _ in range(parts - 1):
        half = -(-len(left) // 2)
        found.append(left[:half])
        left = left[half:]
    if parts == 1:
        return [left]
    found[-1] += left
    return [*found, []]


def second_view(model: torch.nn.Module) -> None:
    """CR-CTC's views without random masks: the second one is louder."""
    model._views = lambda batch: [batch.features_BTF, 1.5 * batch.features_BTF]


def module(build: Builder, branch: str, partition=None) -> torch.nn.Module:
    model = build.module(branch, partition)
    if branch == "pretrain":
        second_view(model)
    return model


def whole_step(build: Builder, stage, batch: Batch) -> tuple[dict[str, Tensor], float, float]:
    """Weights after a step without an engine, its loss and its gradient norm."""
    model = module(build, stage.branch).train().requires_grad_(False)
    trained = [p for part in stage.trains for p in lora.part(model, part)]
    for parameter in trained:
        parameter.requires_grad_(True)
    cfg = build.recipe.engine
    optimizer = torch.optim.AdamW(
        trained, lr=RATE, betas=cfg.betas, eps=cfg.eps, weight_decay=stage.weight_decay
    )
    outputs = model(batch)
    outputs.loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(trained, cfg.max_grad_norm)
    optimizer.step()
    return dict(model.named_parameters()), logged(stage, outputs.sums), float(norm)


def shared_step(
    build: Builder, stage, batch: Batch, folder: Path
) -> tuple[BranchEngine, float, float]:
    """The branch after its step, with the step's loss and gradient norm."""
    cfg = build.recipe.engine
    engine = BranchEngine(stage.branch, module(build, stage.branch, partitioner(cfg)), cfg, folder)
    engine.enter(stage)
    parts = shares(len(batch), distributed.world_size() * stage.grad_accum_steps)
    own = parts[distributed.rank() :: distributed.world_size()]
    report = engine.step([rows(batch, index) for index in own], 0)
    sums = {name: torch.stack(pair) for name, pair in report.sums.items()}
    for pair in sums.values():
        distributed.all_reduce_sum(pair)
    return engine, logged(stage, sums), float(report.grad_norm)


def logged(stage, sums) -> float:
    """The mean a target that is logged."""
    total, count = sums["ctc" if stage.branch == "pretrain" else "nll"]
    return float(total / count)


def compare(build: Builder, stage, batch: Batch, folder: Path) -> dict[str, float]:
    before = dict(module(build, stage.branch).named_parameters())
    expected, loss, norm = whole_step(build, stage, batch)
    engine, own_loss, own_norm = shared_step(build, stage, batch, folder)
    difference = moved = 0.0
    for name, own in zero_partition.weight_fragments(engine.module).items():
        if name in expected and len(own.tensor):
            place = slice(own.start, own.stop)
            there = expected[name].detach().flatten()[place]
            was = before[name].detach().flatten()[place]
            difference = max(difference, float((own.tensor - there).abs().max()))
            moved = max(moved, float((was - there).abs().max()))
    engine.close()
    ranks = distributed.all_gather_object((difference, moved))
    return {
        "difference": max(d for d, _ in ranks),
        "moved": max(m for _, m in ranks),
        "loss": abs(own_loss / loss - 1),
        "norm": abs(own_norm / norm - 1),
    }


def main() -> None:
    path, out = (a for a in sys.argv[1:] if not a.startswith("--"))
    process_setup.init_distributed()
    found = {}
    for name, (stage_name, accumulate) in CASES.items():
        cfg = recipe.load(path, QUIET)
        build = Builder(cfg)
        stage = cfg.stage(stage_name)
        rates = dict.fromkeys(stage.trains, RATE)
        stage = dataclasses.replace(
            stage, trains=rates, warmup_steps=0, grad_accum_steps=accumulate
        )
        found[name] = compare(build, stage, utterances(build.front_end.bins), Path(out).parent)
    if distributed.is_main_rank():
        Path(out).write_text(json.dumps(found))
    distributed.end_process()


main()
