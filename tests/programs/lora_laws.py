"""LoRA stages under ZeRO-3 on the tiny recipe; rank 0 writes OUT/report.json for the laws' test.

usage: lora_laws.py RECIPE OUT. OUT/other_world_size is a checkpoint that more ranks wrote.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from engine_states import same, states

from dsasr import recipe
from dsasr.build import Builder
from dsasr.checkpoint import tensor_fragments, zero_partition
from dsasr.checkpoint.tensor_fragments import FragmentReader
from dsasr.engine import process_setup
from dsasr.engine.branch_engine import BranchEngine
from dsasr.engine.config import EngineConfig
from dsasr.engine.partitioner import partitioner
from dsasr.model import lora
from dsasr.utils import distributed

PARTS = ("encoder", "adaptor", "llm", "lora")


def weights(branch: BranchEngine) -> dict[str, dict[str, torch.Tensor]]:
    """This rank's slices of the weights, by part."""
    slices = {part: {} for part in PARTS}
    for name, fragment in zero_partition.weight_fragments(branch.module).items():
        part = "lora" if lora.is_adapter(name) else name.partition(".")[0]
        slices[part][name] = fragment.tensor.clone()
    return slices


def sharded(build: Builder) -> bool:
    """Whether LoRA's matrices in a model that is loaded partitioned equal those of a whole one."""
    expected, equal = dict(lora.adapters(build.speech_llm().llm)), True
    partitioned = build.speech_llm(partitioner(EngineConfig(precision="fp32"))).llm
    for name, parameter in lora.adapters(partitioned):
        fragment = zero_partition.weight_fragment(parameter)
        part = expected[name].detach().reshape(-1)[fragment.start : fragment.stop]
        equal &= fragment.tensor.numel() < expected[name].numel() and torch.equal(
            fragment.tensor, part
        )
    return not distributed.any_rank(not equal)


def main() -> None:
    path, folder = sys.argv[-2], Path(sys.argv[-1])
    process_setup.init_distributed()
    cfg = recipe.load(path)
    build = Builder(cfg)
    stages = {s.name: s for s in cfg.stages}
    batches = build.validation_batches("sft")
    report: dict = {"frozen": {}, "sharded": sharded(build)}
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
        changed = sorted(p for p in PARTS if not same(before[p], after[p]))
        report["frozen"][name] = [changed, sorted(stage.trains)]
        if name == "ia_sft":
            tensor_fragments.write_folder(folder / "saved", branch.fragments(), {"steps": number})
            saved = states(branch)
            resumed = BranchEngine("sft", build.speech_llm(), config, folder)
            resumed.load(FragmentReader(folder / "saved"), stage, branch.adam_steps())
            report["resumed"] = same(saved, states(resumed))
            reports = [b.step([batches[0]], 2) for b in (branch, resumed)]
            nll, resumed_nll = (float(r.sums["nll"][0]) for r in reports)
            report["continued"] = nll == resumed_nll
            report["continued"] &= same(states(branch), states(resumed))
            resumed.close()
    branch.close()
    # Written by three ranks, read by two: weights, masters and moments.
    fp32 = BranchEngine("sft", build.speech_llm(), EngineConfig(precision="fp32"), folder)
    reader = FragmentReader(folder / "other_world_size")
    fp32.load(reader, stages["ia_sft"], 5.0)
    pieces = fp32.fragments()
    equal = [torch.equal(f.tensor, reader.read(k, f.start, f.stop)) for k, f in pieces.items()]
    report["other_world"] = not distributed.any_rank(not all(equal))
    report["optimizer"] = sorted({k.partition("/")[2] for k in pieces if "/exp_avg/" in k})
    norm = fp32.step([batches[0]], 5).grad_norm
    report["other_world"] &= 0 < float(norm) < float("inf")
    if distributed.is_main_rank():
        (folder / "report.json").write_text(json.dumps(report))
    distributed.end_process()


main()
