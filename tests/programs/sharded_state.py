"""An encoder published and loaded under ZeRO-3, with every tensor that appears counted.

usage: sharded_state.py OUT. Prints nothing; rank 0 writes OUT/found.json.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dsasr.checkpoint import zero_partition
from dsasr.checkpoint.snapshot_store import SnapshotStore
from dsasr.checkpoint.tensor_fragments import FragmentReader
from dsasr.data.batch import Batch
from dsasr.engine import process_setup
from dsasr.engine.branch_engine import BranchEngine
from dsasr.engine.config import EngineConfig
from dsasr.model.outputs import Outputs
from dsasr.schedule import Snapshot
from dsasr.stages import StageConfig
from dsasr.utils import distributed

HEAD = StageConfig("head", "sft", {"llm": 1e-2}, steps=9)
JOINT = StageConfig("joint", "sft", {"encoder": 1e-2, "llm": 1e-2}, steps=9)
SNAPSHOT = Snapshot("encoder-1", 1, "drift")


class Model(nn.Module):
    def __init__(self, seed: int):
        super().__init__()
        torch.manual_seed(seed)
        # Large against other messages between ranks; odd, so that a rank's slice ends in padding.
        self.encoder = nn.Sequential(nn.Linear(301, 307), nn.Linear(307, 311))
        self.llm = nn.Linear(311, 3)

    def count_targets(self, batch: Batch) -> int:
        return 1

    def forward(self, batch: Batch) -> Outputs:
        x = self.llm(self.encoder(batch.features_BTF))
        return Outputs(x.square().mean(), torch.tensor(1.0), {})


class Largest(TorchDispatchMode):
    """The most bytes in any one tensor that an operation takes or gives."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, result)):
            if isinstance(leaf, torch.Tensor):
                self.bytes = max(self.bytes, leaf.numel() * leaf.element_size())
        return result


def batch() -> Batch:
    generator = torch.Generator().manual_seed(distributed.rank())
    return Batch.blank(torch.randn(1, 4, 301, generator=generator), seed=1)


def main() -> None:
    folder = Path(sys.argv[-1])
    process_setup.init_distributed()
    live = BranchEngine("pretrain", Model(1), EngineConfig(), folder)
    live.enter(JOINT)
    receiver = BranchEngine("sft", Model(2), EngineConfig(), folder)
    receiver.enter(HEAD)
    store = SnapshotStore(folder / "store")
    slices = [p.ds_tensor.numel() for p in receiver.module.encoder.parameters()]
    whole = max(p.ds_numel for p in receiver.module.encoder.parameters())
    read: list[int] = []
    plain = FragmentReader.read

    def counted(self, key: str, start: int, stop: int) -> torch.Tensor:
        read.append(stop - start)
        return plain(self, key, start, stop)

    FragmentReader.read = counted
    with Largest() as publishing:
        store.publish(live.module, {}, SNAPSHOT, {})
    with Largest() as loading:
        receiver.load_encoder(store.open(SNAPSHOT.id))
    report = {
        "whole": whole,
        "slice": max(slices),
        "publishing_bytes": max(distributed.all_gather_object(publishing.bytes)),
        "loading_bytes": max(distributed.all_gather_object(loading.bytes)),
        "largest_read": max(distributed.all_gather_object(max(read))),
        "read": sum(distributed.all_gather_object(sum(read))),
        "encoder": sum(p.ds_numel for p in receiver.module.encoder.parameters()),
        "loaded": receiver.checksum() == live.checksum(),
    }
    # Into a stage that trains the encoder and has moments of another one.
    receiver.enter(JOINT)
    receiver.step([batch()], 0)
    trained_checksum = receiver.checksum()
    receiver.load_encoder(store.open(SNAPSHOT.id))
    states = receiver._masters.live.fragments()
    masters, moments = True, True
    for name, parameter in zero_partition.named_parameters(receiver.module, "encoder."):
        master = states[f"master/{name}"]
        masters &= torch.equal(
            master.tensor, zero_partition.weight_range(parameter, master.start, master.stop)
        )
        moments &= not any(states[f"{kind}/{name}"].tensor.any() for kind in zero_partition.MOMENTS)
    others = any(states[f"exp_avg/llm.{n}"].tensor.any() for n in ("weight", "bias"))
    report |= {
        "moved": trained_checksum != live.checksum(),
        "again": receiver.checksum() == live.checksum(),
        "masters": all(distributed.all_gather_object(masters)),
        "moments": all(distributed.all_gather_object(moments)),
        "others_kept": any(distributed.all_gather_object(others)),
    }
    # The next step starts from it: a stale master would put the old encoder back.
    before = [p.ds_tensor.clone() for p in receiver.module.encoder.parameters()]
    receiver.step([batch()], 1)
    after = [p.ds_tensor for p in receiver.module.encoder.parameters()]
    step = max(float((a - b).abs().max()) for a, b in zip(after, before, strict=True))
    report["next_step"] = max(distributed.all_gather_object(step))
    if distributed.is_main_rank():
        (folder / "found.json").write_text(json.dumps(report))
    distributed.end_process()


main()
