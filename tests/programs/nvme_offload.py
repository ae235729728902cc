"""A branch with optimizer states on a disk beside one with them in memory: the same, bit for bit.

usage: nvme_offload.py OUT; rank 0 writes OUT/found.json.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from engine_states import same, states
from torch import nn

from dsasr.checkpoint import tensor_fragments, zero_partition
from dsasr.checkpoint.tensor_fragments import FragmentReader
from dsasr.data.batch import Batch
from dsasr.engine import process_setup
from dsasr.engine.branch_engine import BranchEngine
from dsasr.engine.config import EngineConfig, check_nvme
from dsasr.model.outputs import Outputs
from dsasr.stages import StageConfig
from dsasr.utils import distributed

SFT = StageConfig("sft", "sft", {"adaptor": 1e-2, "llm": 1e-3}, steps=9)
JOINT = StageConfig(
    "joint", "sft", {"encoder": 1e-3, "adaptor": 1e-2, "llm": 1e-3}, steps=9, keep_moments=True
)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.encoder = nn.Linear(8, 150_001)
        self.adaptor = nn.Linear(150_001, 3)  # less than DeepSpeed writes to a disk
        self.llm = nn.Sequential(nn.Linear(3, 900), nn.Linear(900, 900))

    def count_targets(self, batch: Batch) -> int:
        return 1

    def forward(self, batch: Batch) -> Outputs:
        x = self.llm(self.adaptor(self.encoder(batch.features_BTF)) / 100)
        loss = (x - 1).square().mean()
        return Outputs(loss, torch.tensor(1.0), {"nll": (loss.detach(), torch.tensor(1.0))})


def batch(number: int) -> Batch:
    generator = torch.Generator().manual_seed(number * 10 + distributed.rank())
    features = torch.randn(1, 2, 8, generator=generator)
    return Batch.blank(features, seed=number, number=number)


def main() -> None:
    folder = Path(sys.argv[-1])
    process_setup.init_distributed()
    disk = EngineConfig(deepspeed="zero3-nvme", nvme=str(folder / "disk"))
    check_nvme(disk)
    branches = {
        "memory": BranchEngine("sft", Model(), EngineConfig(deepspeed="zero3-offload"), folder),
        "disk": BranchEngine("sft", Model(), disk, folder),
    }
    results: dict = {"equal": [], "files": 0}
    number = 0
    for stage in (SFT, JOINT):
        for branch in branches.values():
            branch.enter(stage)
        results["equal"].append(same(states(branches["memory"]), states(branches["disk"])))
        for _ in range(2):
            losses = [
                float(b.step([batch(number)], number).sums["nll"][0]) for b in branches.values()
            ]
            number += 1
            results["equal"].append(losses[0] == losses[1])
            results["equal"].append(same(states(branches["memory"]), states(branches["disk"])))
    results["files"] = len(list((folder / "disk").rglob("*.swp")))
    empty = [flat.numel() == 0 for flat in branches["disk"]._masters.live.flat_masters()]
    results["swapped"] = [any(empty), all(empty)]
    # A checkpoint of the one on the disk, and a swap of the encoder into it.
    tensor_fragments.write_folder(folder / "saved", branches["disk"].fragments(), {})
    two = EngineConfig(deepspeed="zero3-nvme", nvme=str(folder / "two"))
    again = BranchEngine("sft", Model(), two, folder / "other")
    again.load(FragmentReader(folder / "saved"), JOINT, branches["disk"].adam_steps())
    results["resumed"] = same(states(branches["disk"]), states(again))
    a, b = (b.step([batch(99)], 3) for b in (branches["disk"], again))
    results["continued"] = float(a.sums["nll"][0]) == float(b.sums["nll"][0])
    results["continued"] &= same(states(branches["disk"]), states(again))
    branches["disk"].load_encoder(branches["memory"])
    weights = zero_partition.weight_fragments(branches["disk"].module, "encoder.")
    masters = branches["disk"].masters("encoder.")
    results["loaded"] = same(
        {k: f.tensor for k, f in weights.items()},
        {k.partition("/")[2]: f.tensor for k, f in masters.items()},
    )
    for branch in (*branches.values(), again):
        branch.close()
    results["left"] = len(list((folder / "disk").rglob("*.swp")))
    if distributed.is_main_rank():
        (folder / "found.json").write_text(json.dumps(results))
    distributed.end_process()


main()
