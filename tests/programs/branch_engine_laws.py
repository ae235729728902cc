"""Two branches taking turns on a toy model; rank 0 writes what the tests check.

usage: branch_engine_laws.py OUT COURSE(laws|switches|errors) DEEPSPEED PRECISION OFFLOAD
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
from pathlib import Path

import psutil
import torch
from torch import nn

from dsasr.checkpoint import tensor_fragments, zero_partition
from dsasr.checkpoint.tensor_fragments import FragmentReader
from dsasr.data.batch import Batch
from dsasr.engine import process_setup
from dsasr.engine.branch_engine import BranchEngine
from dsasr.engine.config import EngineConfig
from dsasr.engine.offload import OffloadConfig
from dsasr.model.layerwise_init import full_shape
from dsasr.model.outputs import Outputs
from dsasr.stages import StageConfig
from dsasr.utils import distributed

PRETRAIN = StageConfig("pretrain", "pretrain", {"encoder": 1e-2, "ctc": 3e-2}, steps=100)
ALIGN = StageConfig("align", "sft", {"adaptor": 1e-2}, steps=100)
IA_SFT = StageConfig("ia_sft", "sft", {"adaptor": 1e-2, "llm": 1e-3}, steps=100)
JOINT = StageConfig("joint", "sft", {"encoder": 1e-3, "adaptor": 2e-3, "llm": 3e-3}, steps=100)


def encoder() -> nn.Module:
    # With a persistence threshold of 100,000 ZeRO-3 keeps all but the 400 x 400 gathered; with
    # the packaged one, 0, it keeps none.
    return nn.Sequential(
        nn.Linear(8, 400), nn.Tanh(), nn.Linear(400, 400), nn.Tanh(), nn.Linear(400, 7)
    )


class Toy(nn.Module):
    def __init__(self, parts: dict[str, nn.Module]):
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)

    def count_targets(self, batch: Batch) -> int:
        return 1

    def forward(self, batch: Batch) -> Outputs:
        torch.manual_seed(batch.seed)
        x = batch.features_BTF.to(next(self.parameters()).dtype)
        for part in self.children():
            x = part(x)
        loss = (x - 1).square().float().mean() + torch.rand(()) * x.float().mean()
        return Outputs(loss, torch.tensor(1.0), {"nll": (loss.detach(), torch.tensor(1.0))})


def batch(number: int) -> Batch:
    generator = torch.Generator().manual_seed(number * 10 + distributed.rank())
    features = torch.randn(2, 5, 8, generator=generator)
    return Batch.blank(features, seed=number, number=number)


def digest(branch: BranchEngine) -> str:
    """A digest of each rank's weights, masters and moments."""
    sha = hashlib.sha256()
    for key, fragment in sorted(branch.fragments().items()):
        sha.update(key.encode())
        sha.update(fragment.tensor.float().contiguous().numpy().tobytes())
    return " ".join(distributed.all_gather_object(sha.hexdigest()[:16]))


def weights(branch: BranchEngine, part: str) -> dict[str, torch.Tensor]:
    fragments = zero_partition.weight_fragments(branch.module, f"{part}.")
    return {name: fragment.tensor.clone() for name, fragment in fragments.items()}


def resident(branch: BranchEngine) -> dict[str, torch.Tensor]:
    """The encoder's parameters that ZeRO keeps whole on every rank, as a step will use them."""
    named = zero_partition.named_parameters(branch.module, "encoder.")
    return {name: p.data for name, p in named if p.numel() == math.prod(full_shape(p))}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return not distributed.any_rank(not all(torch.equal(a[key], b[key]) for key in a))


def loss(report) -> str:
    return float(report.sums["nll"][0]).hex()


def take_turns(pre: BranchEngine, sft: BranchEngine | None, results: dict) -> None:
    for number in range(12):
        if sft is not None:
            sft.offload()
        pre.enter(PRETRAIN)
        pre.reload()
        results["losses"].append(loss(pre.step([batch(number)], number)))
        if sft is None:
            continue
        if number not in (3, 6):
            pre.offload()
        stage = ALIGN if number < 4 else IA_SFT
        sft.enter(stage)
        sft.reload()
        if number in (3, 6):
            sft.load_encoder(pre)
            results["swapped"] &= same(weights(sft, "encoder"), weights(pre, "encoder"))
            results["swapped"] &= same(resident(sft), resident(pre))
            results["resident"] = len(resident(sft))
        before = {part: weights(sft, part) for part in ("encoder", "adaptor", "llm")}
        sft.step([batch(100 + number)], number)
        for part, old in before.items():
            unchanged = same(old, weights(sft, part))
            results["frozen"] &= unchanged == (part not in stage.trains)


def join(pre: BranchEngine, sft: BranchEngine, results: dict, folder: Path, fresh) -> None:
    """The joint stage from the live encoder, saved, loaded into a new branch, and stepped."""
    pre.reload()
    sft.enter(JOINT)
    sft.load_encoder(pre)
    masters, sft_masters = pre.masters("encoder."), sft.masters("encoder.")
    results["masters"] = same(
        {key: f.tensor for key, f in masters.items()},
        {key: sft_masters[key].tensor for key in masters},
    )
    sft.step([batch(3)], 0)
    tensor_fragments.write_folder(folder / "saved", sft.fragments() | pre.fragments(), {})
    tensor_fragments.verify(folder / "saved")
    again = fresh("sft", ("encoder", "adaptor", "llm"))
    again.load(FragmentReader(folder / "saved"), JOINT, sft.adam_steps())
    results["saved"] = digest(sft) == digest(again)
    a, b = sft.step([batch(9)], 50), again.step([batch(9)], 50)
    results["continued"] = loss(a) == loss(b) and digest(sft) == digest(again)
    results["lrs"] = a.lrs == b.lrs
    results["groups"] = {g["name"]: g["lr"] for g in again._optimizer_groups()}


def switch(sft: BranchEngine, results: dict) -> None:
    """Fifty stage switches; memory and hooks after each ten."""
    process = psutil.Process()
    for number in range(52):
        sft.enter(IA_SFT if number % 2 else ALIGN)
        sft.step([batch(number)], 0)
        if number % 10 == 1:
            results["rss"].append(process.memory_info().rss)
            hooks = sum(
                len(m._forward_hooks) + len(m._forward_pre_hooks) for m in sft.module.modules()
            )
            results["hooks"].append(hooks)


def evaluate(branch: BranchEngine, fails: bool) -> str:
    """A loss without a step. With ``fails`` an error cuts the forward pass short, once before, with
    layers gathered."""

    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    if fails:
        hook = branch.module.encoder[2].register_forward_pre_hook(fail)
        try:
            with branch.evaluating() as module:
                module(batch(50))
        except RuntimeError:
            hook.remove()
    with branch.evaluating() as module:
        return float(module(batch(50)).loss).hex()


def go_on(branch: BranchEngine, fails: bool) -> list[str]:
    """Losses and states of a branch that is evaluated between its steps."""
    found = []
    branch.enter(PRETRAIN)
    for number in range(6):
        found.append(loss(branch.step([batch(number)], number)))
        if number in (2, 3):
            found.append(evaluate(branch, fails))
    return [*found, digest(branch)]


def main() -> None:
    out, course, deepspeed, precision, device = sys.argv[-5:]
    folder = Path(out)
    process_setup.init_distributed()
    config = EngineConfig(
        deepspeed=deepspeed, precision=precision, offload=OffloadConfig(device=device)
    )

    def fresh(name: str, parts: tuple[str, ...]) -> BranchEngine:
        torch.manual_seed(1)
        sizes = {"ctc": (7, 5), "adaptor": (7, 5), "llm": (5, 300)}
        modules = {p: encoder() if p == "encoder" else nn.Linear(*sizes[p]) for p in parts}
        return BranchEngine(name, Toy(modules), config, folder)

    both = ("encoder", "adaptor", "llm")
    results: dict = {"losses": [], "swapped": True, "frozen": True, "rss": [], "hooks": []}
    if course == "switches":
        switch(fresh("sft", both), results)
    elif course == "errors":
        names = ("encoder", "ctc")
        for key, fails in (("without", False), ("with", True)):
            results[key] = go_on(branch := fresh("pretrain", names), fails)
            branch.close()
    else:
        alone = fresh("pretrain", ("encoder", "ctc"))
        take_turns(alone, None, results)
        results["alone"] = [results["losses"], digest(alone)]
        alone.close()
        results["losses"] = []
        pre, sft = fresh("pretrain", ("encoder", "ctc")), fresh("sft", both)
        take_turns(pre, sft, results)
        pre.reload()
        results["beside"] = [results["losses"], digest(pre)]
        join(pre, sft, results, folder, fresh)
    if distributed.is_main_rank():
        (folder / f"{course}.json").write_text(json.dumps(results))
    distributed.end_process()


main()
