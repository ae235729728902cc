"""Models built partitioned compared with models built whole, under ZeRO-3.

usage: sharded_load.py RECIPE OUT case override … case override …, where a case is written NAME:
Rank 0 writes OUT/report.json.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from engine_states import same, states

from dsasr import recipe
from dsasr.build import Builder
from dsasr.engine import process_setup
from dsasr.engine.branch_engine import BranchEngine
from dsasr.engine.partitioner import partitioner
from dsasr.utils import distributed


class CountingPartition:
    """Partitions, and measures a rank's peak of parameters: its slices and a layer's weights."""

    def __init__(self, partition):
        self.partition, self.slices, self.peak = partition, 0, 0

    def __call__(self, parameters) -> None:
        self.peak = max(self.peak, self.slices + sum(p.numel() for p in parameters))
        self.partition(parameters)
        self.slices += sum(p.ds_tensor.numel() for p in parameters)


def compare(cfg: recipe.Recipe, name: str, folder: Path) -> dict:
    """A branch built whole and partitioned, from its weights to three steps of its last stage."""
    build = Builder(cfg)
    stage = next(s for s in reversed(cfg.stages) if s.branch == name)
    batches = build.validation_batches(name)
    partition = CountingPartition(partitioner(cfg.engine))
    whole, sharded = build.module(name), build.module(name, partition)
    total = sum(p.numel() for p in whole.parameters())
    buffers = same(dict(whole.named_buffers()), dict(sharded.named_buffers()))
    branches = [BranchEngine(name, module, cfg.engine, folder) for module in (whole, sharded)]
    for branch in branches:
        branch.enter(stage)
    initial = [states(branch) for branch in branches]
    losses = []
    for branch in branches:
        reports = [branch.step([batches[i % len(batches)]], i) for i in range(3)]
        losses.append([sorted((k, float(t)) for k, (t, _) in r.sums.items()) for r in reports])
    final = [states(branch) for branch in branches]
    for branch in branches:
        branch.close()
    return {
        "initial": same(*initial),
        "losses": losses[0] == losses[1],
        "final": same(*final),
        "trained": not same(initial[0], final[0]),
        "buffers": buffers,
        "names": sorted(initial[1]),
        "peak": max(distributed.all_gather_object(partition.peak)),
        "total": total,
    }


def main() -> None:
    path, out, *words = [x for x in sys.argv[1:] if not x.startswith("--local_rank")]
    process_setup.init_distributed()
    report, cases = {}, {}
    for word in words:
        if word.endswith(":"):
            overrides = cases.setdefault(word[:-1], [])
        else:
            overrides.append(word)
    for case, overrides in cases.items():
        cfg = recipe.load(path, overrides)
        names = ("pretrain", "sft") if case == "plain" else ("sft",)
        report[case] = {name: compare(cfg, name, Path(out)) for name in names}
    if distributed.is_main_rank():
        (Path(out) / "report.json").write_text(json.dumps(report))
    distributed.end_process()


main()
