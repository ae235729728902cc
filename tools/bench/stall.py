"""How long training stands still for a checkpoint that is written in the background.

``DS_ACCELERATOR=cpu deepspeed --num_gpus 2 tools/bench/stall.py --sizes 20 100``. For each size
the pretrain branch makes steps on ``--audio`` seconds a rank, and a checkpoint of all that it
holds is saved after every third. By the wall clock, slowest rank: ``step``, with nothing being
written; ``stall``, that `save` keeps the loop waiting; ``beside``, the step right after, beside the
writer's thread; ``write``, until the checkpoint is there. One JSON line a size goes to
results.jsonl.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import shutil
import statistics
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch
from common import record
from swap import SIZES, Parts, batch, seconds

from dsasr.checkpoint.manager import CheckpointConfig, CheckpointManager
from dsasr.data.batch import Batch
from dsasr.engine import process_setup
from dsasr.engine.branch_engine import BranchEngine
from dsasr.engine.config import EngineConfig
from dsasr.stages import StageConfig
from dsasr.utils import distributed
from dsasr.utils.errors import run_tool

SHAPES = {**SIZES, 20: (320, 10)}
PRETRAIN = StageConfig("pretrain", "pretrain", {"encoder": 1e-4}, steps=1000)


def audio(length: float) -> Batch:
    """So many seconds of noise, in rows of four."""
    template, rows = batch(), max(1, round(length / 4))
    return dataclasses.replace(
        template,
        features_BTF=torch.randn(rows, 400, 80),
        feature_lengths_B=torch.full((rows,), 400),
    )


def save(checkpoints: CheckpointManager, branch: BranchEngine, steps: int) -> None:
    checkpoints.save(steps, branch.fragments(), {}, wait=False)


def measure(size: int, rounds: int, length: float, folder: Path) -> None:
    width, layers = SHAPES[size]
    branch = BranchEngine("pretrain", Parts(width, layers, 0), EngineConfig(), folder)
    branch.enter(PRETRAIN)
    checkpoints = CheckpointManager(folder / "checkpoints", CheckpointConfig(keep=1))
    fed, steps = audio(length), 0
    times: dict[str, list[float]] = {"step": [], "stall": [], "beside": [], "write": []}

    def step() -> float:
        return seconds(lambda: branch.step([fed], 0))

    step()  # Adam's moments are there from here on
    for _ in range(rounds):
        times["step"] += [step(), step()]
        steps += 3
        times["stall"].append(seconds(partial(save, checkpoints, branch, steps)))
        times["beside"].append(step())
        checkpoints._finish_write()
        times["write"] += [done.seconds for done in checkpoints.finished_saves()]
    count = sum(p.ds_numel for p in branch.module.parameters())
    saved = sum(f.tensor.numel() * f.tensor.element_size() for f in branch.fragments().values())
    saved = sum(distributed.all_gather_object(saved))
    branch.close()
    if distributed.is_main_rank():
        middle = {name: statistics.median(values) for name, values in times.items()}
        record(
            "stall",
            parameters=count,
            ranks=distributed.world_size(),
            rounds=rounds,
            clock="wall",
            audio_seconds=length,
            checkpoint_mib=round(saved / 2**20, 1),
            **{f"{name}_ms": round(1000 * value, 1) for name, value in middle.items()},
            stall_ms_range=[round(1000 * f(times["stall"]), 1) for f in (min, max)],
            stall_steps=round(middle["stall"] / middle["step"], 3),
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[20, 100], choices=sorted(SHAPES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--audio", type=float, default=4.0, help="seconds a rank and step")
    parser.add_argument("--folder", help="where to save (default: the temporary folder)")
    parser.add_argument("--local_rank", type=int, default=0, help="set by the deepspeed launcher")
    options = parser.parse_args()
    process_setup.set_threads(EngineConfig())
    process_setup.init_distributed()
    for size in options.sizes:
        path = tempfile.mkdtemp(dir=options.folder) if distributed.is_main_rank() else None
        folder = Path(distributed.broadcast(path))
        try:
            measure(size, options.rounds, options.audio, folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        gc.collect()
    distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(main))
