"""LoRA stages under ZeRO-3 on the tiny recipe; what the laws are checked on goes to OUT/found.json.

usage: lora_laws.py RECIPE OUT. OUT/cut holds a checkpoint that another number of ranks wrote.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from dsasr import recipe
from dsasr.build import Builder
from dsasr.checkpoint import tensor_fragments, zero_partition
from dsasr.checkpoint.tensor_fragments import FragmentReader
from dsasr.engine import branch_engine
from dsasr.engine.branch_engine import BranchEngine, EngineConfig, partitioner
from dsasr.model import lora
from dsasr.utils import distributed

PARTS = ("encoder", "adaptor", "llm", "lora")


def weights(branch: BranchEngine) -> dict[str, dict[str, torch.Tensor]]:
    """By part, this rank's slices."""
    held = {part: {} for part in PARTS}
    for name, fragment in zero_partition.weight_fragments(branch.module).items():
        part = "lora" if lora.is_adapter(name) else name.partition(".")[0]
        held[part][name] = fragment.tensor.clone()
    return held


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    differ = one.keys() != other.keys() or not all(torch.equal(one[k], other[k]) for k in one)
    return not distributed.any_rank(differ)


def states(branch: BranchEngine) -> dict[str, torch.Tensor]:
    return {key: fragment.tensor.clone() for key, fragment in branch.fragments().items()}


def sharded(build: Builder) -> bool:
    """Whether matrices drawn into a model that is never whole are those of the whole one."""
    wanted, equal = dict(lora.adapters(build.speech_llm().llm)), True
    cut = build.speech_llm(partitioner(EngineConfig(precision="fp32"))).llm
    for name, parameter in lora.adapters(cut):
        held = zero_partition.weight_fragment(parameter)
        part = wanted[name].detach().reshape(-1)[held.start : held.stop]
        equal &= held.tensor.numel() < wanted[name].numel() and torch.equal(held.tensor, part)
    return not distributed.any_rank(not equal)


def main() -> None:
    given, folder = sys.argv[-2], Path(sys.argv[-1])
    branch_engine.init_distributed()
    chosen = recipe.load(given)
    build = Builder(chosen)
    stages = {s.name: s for s in chosen.stages}
    batches = build.held_out("sft")
    found: dict = {"frozen": {}, "sharded": sharded(build)}
    config = EngineConfig(precision="bf16")
    branch = BranchEngine("sft", build.speech_llm(), config, folder)
    number = 0
    for name in ("align", "ia_sft", "only", "joint"):
        stage = stages[name]
        branch.enter(stage)
        before = weights(branch)
        for step in range(2):
            branch.step([batches[number % len(batches)]], step)
            number += 1
        after = weights(branch)
        moved = sorted(p for p in PARTS if not same(before[p], after[p]))
        found["frozen"][name] = [moved, sorted(stage.trains)]
        if name == "ia_sft":
            tensor_fragments.write_folder(folder / "saved", branch.fragments(), {"steps": number})
            kept = states(branch)
            again = BranchEngine("sft", build.speech_llm(), config, folder)
            again.load(FragmentReader(folder / "saved"), stage, branch.adam_steps())
            found["resumed"] = same(kept, states(again))
            one, other = (b.step([batches[0]], 2) for b in (branch, again))
            found["continued"] = float(one.sums["nll"][0]) == float(other.sums["nll"][0])
            found["continued"] &= same(states(branch), states(again))
            again.close()
    branch.close()
    # Written by three ranks, read by two: weights, masters and moments.
    other = BranchEngine("sft", build.speech_llm(), EngineConfig(precision="fp32"), folder)
    reader = FragmentReader(folder / "cut")
    other.load(reader, stages["ia_sft"], 5.0)
    pieces = other.fragments()
    equal = [torch.equal(f.tensor, reader.read(k, f.start, f.stop)) for k, f in pieces.items()]
    found["other_world"] = not distributed.any_rank(not all(equal))
    found["optimizer"] = sorted({k.partition("/")[2] for k in pieces if "/exp_avg/" in k})
    norm = other.step([batches[0]], 5).grad_norm
    found["other_world"] &= 0 < float(norm) < float("inf")
    if distributed.is_main_rank():
        (folder / "found.json").write_text(json.dumps(found))
    distributed.end_process()


main()
