"""bf16 masters over stages, resumes and swaps where ranks partition them; rank 0 writes what the
tests check.

usage: master_weights_two.py OUT DEEPSPEED
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from engine_states import same
from torch import nn

from dsasr.checkpoint import repartition, tensor_fragments
from dsasr.checkpoint.snapshot_store import SnapshotStore
from dsasr.checkpoint.tensor_fragments import Fragment, FragmentReader
from dsasr.data.batch import Batch
from dsasr.engine import process_setup
from dsasr.engine.branch_engine import BranchEngine
from dsasr.engine.config import EngineConfig
from dsasr.model.outputs import Outputs
from dsasr.schedule import Snapshot
from dsasr.stages import StageConfig
from dsasr.utils import distributed

PRETRAIN = StageConfig("pretrain", "pretrain", {"encoder": 1e-2, "ctc": 1e-2}, steps=9)
HEAD = StageConfig("head", "pretrain", {"ctc": 1e-2}, steps=9)
ALIGN = StageConfig("align", "sft", {"adaptor": 1e-2}, steps=9)
IA_SFT = StageConfig("ia_sft", "sft", {"llm": 1e-2}, steps=9)
JOINT = StageConfig("joint", "sft", {"encoder": 1e-2, "adaptor": 1e-2, "llm": 1e-2}, steps=9)
KEPT = StageConfig("kept", "sft", {"adaptor": 1e-2, "llm": 1e-2}, steps=9, keep_moments=True)
# Odd sizes: no partition of one stage is that of another.
SIZES = {"encoder": (7, 13), "ctc": (13, 5), "adaptor": (13, 11), "llm": (11, 3)}


class Toy(nn.Module):
    def __init__(self, parts: tuple[str, ...]):
        super().__init__()
        torch.manual_seed(1)
        for part in parts:
            self.add_module(part, nn.Linear(*SIZES[part]))

    def count_targets(self, batch: Batch) -> int:
        return 1

    def forward(self, batch: Batch) -> Outputs:
        x = batch.features_BTF.to(next(self.parameters()).dtype)
        for part in self.children():
            x = part(x)
        return Outputs((x - 1).square().float().mean(), torch.tensor(1.0), {})


def step(branch: BranchEngine, number: int) -> None:
    generator = torch.Generator().manual_seed(number * 10 + distributed.rank())
    branch.step([Batch.blank(torch.randn(2, 5, 7, generator=generator), seed=number)], number)


def whole(branch: BranchEngine, folder: Path) -> dict[str, torch.Tensor]:
    """All weights, masters and moments of the branch, of all ranks."""
    tensor_fragments.write_folder(folder, branch.fragments(), {})
    distributed.barrier()
    reader = FragmentReader(folder)
    return {key: reader.whole(key) for key in reader.shapes}


def exact(states: dict[str, torch.Tensor], prefix: str, branch: str = "sft") -> int:
    """Masters that have more bits than the weights."""
    names = [k for k in states if k.startswith(f"{branch}/master/{prefix}")]
    return sum(not torch.equal(states[k], states[k.replace("/master", "")].float()) for k in names)


def exchange() -> dict[str, bool]:
    """Ranges of one tensor, which has a -0.0 and a NaN, between two ranks."""
    values = torch.tensor([-0.0, float("nan"), 1e-40, *torch.randn(8).tolist()])
    values = distributed.broadcast(values)
    rank = distributed.rank()
    have, want = ((0, 3), (3, 11))[rank], ((2, 9), (9, 11))[rank]
    repartition.BLOCK = 4
    found = repartition.repartition(
        {"a": Fragment((11,), have[0], values[slice(*have)]),
         "b": Fragment((1, 3), 0, values[:3] if rank else values[:0]),
         "c": Fragment((1,), 0, values[:0])},
        {"a": want, "b": (0, 3) if rank else (0, 0)},
    )  # fmt: skip
    bits = found["a"].tensor.view(torch.int32)
    equal = (
        torch.equal(bits, values[slice(*want)].view(torch.int32)) and found["a"].start == want[0]
    )
    missing = False
    try:
        repartition.repartition({"a": Fragment((11,), have[0], values[slice(*have)][:1])},
                                {"a": want})  # fmt: skip
    except RuntimeError as error:
        missing = "2 of the 11 elements" in str(error)
    return {
        "exchanged": not distributed.any_rank(not equal),
        "left_out": set(found) == {"a", "b"},
        "missing": not distributed.any_rank(not missing),
    }


def main() -> None:
    folder, deepspeed = Path(sys.argv[-2]), sys.argv[-1]
    process_setup.init_distributed()
    config = EngineConfig(deepspeed=deepspeed, precision="bf16")
    results: dict = exchange()
    buffers = f"deepspeed_allreduce_buffer_*_{os.environ['MASTER_PORT']}_*"
    results["left"] = [path.name for path in Path("/dev/shm").glob(buffers)]

    def fresh(name: str) -> BranchEngine:
        parts = ("encoder", "ctc") if name == "pretrain" else ("encoder", "adaptor", "llm")
        return BranchEngine(name, Toy(parts), config, folder)

    def resumed(branch: BranchEngine, name: str) -> BranchEngine:
        """A new branch with what ``branch`` has saved."""
        again = fresh(branch.name)
        again.load(FragmentReader(folder / name), branch.stage, branch.adam_steps())
        return again

    pretrain, sft = fresh("pretrain"), fresh("sft")
    pretrain.enter(PRETRAIN)
    sft.enter(ALIGN)
    for number in range(3):
        step(pretrain, number)
        step(sft, number)
    # The published encoder keeps its masters, also after a stage that trains the head alone.
    before = whole(pretrain, folder / "pretrain")
    pretrain.enter(HEAD)
    store = SnapshotStore(folder / "store")
    store.publish(pretrain.module, pretrain.masters(""), Snapshot("encoder-3", 3, "final"), {})
    sft.enter(IA_SFT)
    sft.load_encoder(pretrain)
    step(sft, 3)
    at_ia_sft = whole(sft, folder / "at_ia_sft")
    results["encoder"] = exact(at_ia_sft, "encoder.")
    results["from_live"] = all(
        torch.equal(at_ia_sft[f"sft/master/{n}"], before[f"pretrain/master/{n}"])
        for n in ("encoder.weight", "encoder.bias")
    )
    # Resumed here, it enters the joint stage as the uninterrupted branch does, and steps alike.
    again = resumed(sft, "at_ia_sft")
    other = resumed(sft, "at_ia_sft")
    other.load_encoder(store.open("encoder-3"))  # as the sft job of a concurrent run
    branches = {"uninterrupted": sft, "resumed": again, "from_store": other}
    for name, branch in branches.items():
        branch.enter(JOINT)
        branches[name] = entered = whole(branch, folder / f"{name}-joint")
        results[name] = [exact(entered, part) for part in ("encoder.", "adaptor.", "llm.")]
        step(branch, 4)
        branches[name] |= {f"{k} after": t for k, t in whole(branch, folder / name).items()}
    results["equal"] = [same(branches["uninterrupted"], b) for b in branches.values()]
    # Into a stage that trains it already.
    sft.load_encoder(pretrain)
    live = whole(sft, folder / "live")
    results["swapped_live"] = all(
        torch.equal(live[f"sft/master/{n}"], before[f"pretrain/master/{n}"])
        for n in ("encoder.weight", "encoder.bias")
    )
    # Moments that are kept, in another partition; and the encoder's masters beside them.
    moments = {k: t for k, t in live.items() if "/exp_avg" in k and "encoder" not in k}
    sft.enter(KEPT)
    kept = whole(sft, folder / "kept")
    results["kept"] = len(moments) == 8 and all(torch.equal(kept[k], moments[k]) for k in moments)
    results["dormant"] = exact(kept, "encoder.")
    if distributed.is_main_rank():
        (folder / "found.json").write_text(json.dumps(results))
    distributed.end_process()


main()
