"""What makes CTC leave its plateau sooner: the demo's pretraining, with one change at a time.

    python tools/experiments/ctc_plateau.py --variants none muon --seeds 1 2 3 --steps 400

Run it where `tools/quickstart.sh` has made corpus/demo. One process, batches of 3,000 frames, the
recipe's AdamW (without DeepSpeed, which a change of optimizer would need to know). Convolutions in
the head run on frames as they are, which a run of dsasr would standardize. Each run appends a line
to ``--out``: CTC in nats a phoneme, means of 20 steps (with the penalty, of blank-penalty), and the
last step of the first window whose mean is below 2.6.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor, nn

from dsasr import recipe
from dsasr.build import Builder
from dsasr.data.batch import Batch
from dsasr.engine import process_setup
from dsasr.kernels import dispatch
from dsasr.model.ctc import BLANK, CtcHead, ctc_loss
from dsasr.model.ctc_model import CtcModel
from dsasr.model.weight_init import ResidualLinear
from dsasr.recipe import Recipe
from dsasr.stages import StageConfig, learning_rate
from dsasr.utils import distributed

LEFT = 2.6  # nats a phoneme: off the plateau
WINDOW = 20  # steps of a mean

OVERRIDES = {
    "dropout-0.1": ["model.encoder.dropout=0.1"],
    "head-convolutions": ["model.pretrain.head.layers=2"],
    "mixed-lengths": ["data.dataloader.batch.bucket=0.3"],
    "small-batches": ["data.dataloader.batch.frames=1500"],
    "beta2-0.999": ["engine.betas=[0.9,0.999]"],
    "lr-doubled": ["stages.pretrain.trains={encoder: 2.0e-3, ctc: 2.0e-3}"],
}
# What each branch of a block adds at first, in torch's size; by default one of their number.
SCALES = {
    "full-branches": 1.0,
    "third-branches": 1 / 3,
    "quarter-branches": 1 / 4,
    "eighth-branches": 1 / 8,
    "zero-branches": 0.0,
}
# Changes that no recipe has.
CODED = (
    "auxiliary-ctc",  # CTC of the middle block's frames, through a head of its own, weight 0.3
    "shortest-first",  # the first quarter of the steps in order of length
    "muon",  # for the matrices of the encoder's blocks, at AdamW's size of an update
    "muon-doubled",  # the same at twice the lr
    *SCALES,
    "small-head",  # the head's projection starts at a tenth: all units equally likely
    "blank-penalty",  # the blank's logit less 3, over the first half less and less
)
VARIANTS = ("none", *OVERRIDES, *CODED)


class Auxiliary(nn.Module):
    """CTC from the frames of the encoder's middle block."""

    def __init__(self, model: CtcModel):
        super().__init__()
        self.norm = nn.LayerNorm(model.encoder.width)
        self.head = CtcHead(model.encoder.width, model.ctc.project.out_features)
        blocks = model.encoder.blocks
        blocks[(len(blocks) - 1) // 2].register_forward_hook(self._keep)

    def _keep(self, _module: nn.Module, _inputs: tuple, frames_BSE: Tensor) -> None:
        self.frames_BSE = frames_BSE

    def loss(self, model: CtcModel, batch: Batch) -> Tensor:
        lengths_B = model.encoder.output_lengths(batch.feature_lengths_B)
        log_probs = self.head(self.norm(self.frames_BSE), lengths_B)
        found = ctc_loss(log_probs, lengths_B, batch.phonemes_BP, batch.phoneme_lengths_B)
        return found.nll_B.sum() / max(int(found.phonemes), 1)


def change(model: CtcModel, variant: str) -> None:
    """Change what the model starts from."""
    with torch.no_grad():
        if variant == "small-head":
            model.ctc.project.weight.mul_(0.1)
            model.ctc.project.bias.mul_(0.1)
        for last in model.encoder.modules():
            if isinstance(last, ResidualLinear):
                last.weight.mul_(branch_scale(variant) * last.branches)
                last.bias.mul_(branch_scale(variant) * last.branches)


def branch_scale(variant: str) -> float:
    """Of the first weights of the branches' last layers."""
    return SCALES.get(variant, 1 / recipe.load("demo").model.encoder.branches)


def penalize_blank(model: CtcModel) -> Callable[[float], None]:
    """Lower the blank's logit in training; returns the setter of the amount."""
    amount = [0.0]

    def lowered(_module: nn.Module, _inputs: tuple, logits: Tensor) -> Tensor:
        penalty = torch.zeros(logits.shape[-1])
        penalty[BLANK] = amount[0]
        return logits - penalty * model.training

    model.ctc.project.register_forward_hook(lowered)

    def set_amount(value: float) -> None:
        amount[0] = value

    return set_amount


def optimizers(cfg: Recipe, modules: list[nn.Module], variant: str) -> list[torch.optim.Optimizer]:
    weights = [p for module in modules for p in module.parameters()]
    matrices: list[nn.Parameter] = []
    if variant.startswith("muon"):
        matrices = [p for p in modules[0].encoder.blocks.parameters() if p.ndim == 2]
        chosen = set(map(id, matrices))
        weights = [p for p in weights if id(p) not in chosen]
    engine = cfg.engine
    found = [torch.optim.AdamW(weights, betas=engine.betas, eps=engine.eps, weight_decay=0.0)]
    if matrices:
        options = {"weight_decay": 0.0, "adjust_lr_fn": "match_rms_adamw"}
        found.append(torch.optim.Muon(matrices, **options))
    return found


def ordered(batches: Iterator[Batch], variant: str, steps: int) -> Iterator[Batch]:
    if variant == "shortest-first":
        first = list(islice(batches, steps // 4))
        yield from sorted(first, key=lambda b: b.audio_seconds / max(len(b), 1))
    yield from batches


def run(variant: str, seed: int, steps: int, planned: int) -> dict:
    cfg = recipe.load(
        "demo",
        [f"seed={seed}", "data.dataloader.batch.frames=3000", f"stages.pretrain.steps={planned}",
         *OVERRIDES.get(variant, [])],
    )  # fmt: skip
    process_setup.set_threads(cfg.engine)
    dispatch.select(cfg.kernels)
    builder, stage = Builder(cfg), cfg.stage("pretrain")
    model = builder.module("pretrain").train()
    torch.manual_seed(seed)
    change(model, variant)
    modules: list[nn.Module] = [model]
    auxiliary = Auxiliary(model) if variant == "auxiliary-ctc" else None
    if auxiliary is not None:
        modules.append(auxiliary)
    penalty = penalize_blank(model) if variant == "blank-penalty" else None
    losses, started = [], time.perf_counter()
    with closing(builder.train_dataloader(stage, None)) as loader:
        taken = optimizers(cfg, modules, variant)
        for step, batch in enumerate(islice(ordered(iter(loader), variant, steps), steps)):
            if penalty is not None:
                penalty(3.0 * max(1 - 2 * step / steps, 0.0))
            losses.append(train(cfg, stage, modules, taken, batch, step, variant))
    means = [sum(losses[i : i + WINDOW]) / WINDOW for i in range(0, len(losses), WINDOW)]
    left = next((WINDOW * (i + 1) for i, loss in enumerate(means) if loss < LEFT), None)
    return {
        "variant": variant, "seed": seed, "branch_scale": round(branch_scale(variant), 3),
        "steps": steps, "left_at": left,
        "ctc": {WINDOW * (i + 1): round(loss, 3) for i, loss in enumerate(means)},
        "seconds": round(time.perf_counter() - started),
    }  # fmt: skip


def train(
    cfg: Recipe, stage: StageConfig, modules: list[nn.Module],
    taken: list[torch.optim.Optimizer], batch: Batch, step: int, variant: str,
) -> float:  # fmt: skip
    """A step; returns its CTC in nats a phoneme."""
    model = modules[0]
    lr = learning_rate(stage, "encoder", step)
    outputs = model(batch)
    loss = outputs.loss_sum / max(float(outputs.targets), 1.0)
    for auxiliary in modules[1:]:
        loss = 0.7 * loss + 0.3 * auxiliary.loss(model, batch)
    loss.backward()
    weights = [p for module in modules for p in module.parameters()]
    nn.utils.clip_grad_norm_(weights, cfg.engine.max_grad_norm)
    for number, optimizer in enumerate(taken):
        for group in optimizer.param_groups:
            group["lr"] = lr * (2 if number and variant == "muon-doubled" else 1)
        optimizer.step()
        optimizer.zero_grad()
    total, count = outputs.sums["ctc"]
    return float(total / count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--planned", type=int, default=900, help="steps over which the lr decays")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.steps < 1 or args.steps % WINDOW:
        parser.error(f"--steps: a multiple of {WINDOW}")
    for seed in args.seeds:
        for variant in args.variants:
            line = json.dumps(run(variant, seed, args.steps, args.planned))
            print(line, flush=True)
            if args.out:
                with args.out.open("a", encoding="utf-8") as file:
                    file.write(line + "\n")


if __name__ == "__main__":
    main()
    distributed.end_process(0)
