"""Models built in slices against models built whole, under ZeRO-3; rank 0 writes OUT/found.json.

usage: sharded_load.py RECIPE OUT case override … case override …, where a case is called NAME:
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from dsasr import recipe
from dsasr.build import Builder
from dsasr.engine import branch_engine
from dsasr.engine.branch_engine import BranchEngine, partitioner
from dsasr.utils import distributed


def held(branch: BranchEngine) -> dict[str, torch.Tensor]:
    return {key: fragment.tensor.clone() for key, fragment in branch.fragments().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    differ = one.keys() != other.keys() or not all(torch.equal(one[k], other[k]) for k in one)
    return not distributed.any_rank(differ)


class Counted:
    """A cut that notes how much of a model a rank held at once: slices, and a layer's weights."""

    def __init__(self, cut):
        self.cut, self.slices, self.most = cut, 0, 0

    def __call__(self, parameters) -> None:
        self.most = max(self.most, self.slices + sum(p.numel() for p in parameters))
        self.cut(parameters)
        self.slices += sum(p.ds_tensor.numel() for p in parameters)


def compare(chosen: recipe.Recipe, name: str, folder: Path) -> dict:
    """A branch whole and in slices, from its weights to three steps of its last stage."""
    build = Builder(chosen)
    stage = next(s for s in reversed(chosen.stages) if s.branch == name)
    batches = build.held_out(name)
    cut = Counted(partitioner(chosen.engine))
    whole, slices = build.module(name), build.module(name, cut)
    total = sum(p.numel() for p in whole.parameters())
    buffers = same(dict(whole.named_buffers()), dict(slices.named_buffers()))
    branches = [BranchEngine(name, module, chosen.engine, folder) for module in (whole, slices)]
    for branch in branches:
        branch.enter(stage)
    started = [held(branch) for branch in branches]
    losses = []
    for branch in branches:
        reports = [branch.step([batches[i % len(batches)]], i) for i in range(3)]
        losses.append([sorted((k, float(t)) for k, (t, _) in r.sums.items()) for r in reports])
    ended = [held(branch) for branch in branches]
    for branch in branches:
        branch.close()
    return {
        "started": same(*started),
        "losses": losses[0] == losses[1],
        "ended": same(*ended),
        "moved": not same(started[0], ended[0]),
        "buffers": buffers,
        "names": sorted(started[1]),
        "most": max(distributed.all_gather_object(cut.most)),
        "total": total,
    }


def main() -> None:
    path, out, *given = [x for x in sys.argv[1:] if not x.startswith("--local_rank")]
    branch_engine.init_distributed()
    found, cases = {}, {}
    for word in given:
        if word.endswith(":"):
            overrides = cases.setdefault(word[:-1], [])
        else:
            overrides.append(word)
    for case, overrides in cases.items():
        chosen = recipe.load(path, overrides)
        names = ("pretrain", "sft") if case == "plain" else ("sft",)
        found[case] = {name: compare(chosen, name, Path(out)) for name in names}
    if distributed.is_main_rank():
        (Path(out) / "found.json").write_text(json.dumps(found))
    distributed.end_process()


main()
