"""Device syncs of a training step, by stage: ``host_waits.py RECIPE OUT ZERO``, one rank.

Counts the operations whose result the host needs: on a GPU each of them waits for the queue, unless
its tensor is on the host. tests/training/test_host_waits.py shows that the model has none on device
tensors; this program counts those that the engine adds.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections import Counter
from pathlib import Path

import deepspeed
import transformers
from torch.utils._python_dispatch import TorchDispatchMode

import dsasr
from dsasr import recipe
from dsasr.build import Builder
from dsasr.engine import process_setup
from dsasr.engine.branch_engine import BranchEngine
from dsasr.utils import distributed

WAITS = ("_local_scalar_dense", "nonzero", "equal", "masked_select", "unique")


class HostReads(TorchDispatchMode):
    """Counts operations whose result's value or shape the host needs, by their caller."""

    def __init__(self):
        super().__init__()
        self.by_caller: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name.removeprefix("aten::") in WAITS:
            self.by_caller[caller()] += 1
        return func(*args, **(kwargs or {}))


ROOTS = [Path(package.__file__).parent for package in (deepspeed, transformers, dsasr)]


def caller() -> str:
    """The innermost function on the stack of dsasr, DeepSpeed or transformers."""
    for frame in reversed(traceback.extract_stack()[:-2]):
        for root in ROOTS:  # not by name: the virtual environment may be in a folder called dsasr
            if Path(frame.filename).is_relative_to(root):
                inner = Path(frame.filename).relative_to(root.parent)
                return f"{inner.as_posix()}:{frame.name}"
    return "elsewhere"


def main() -> None:
    path, out, zero = (a for a in sys.argv[1:] if not a.startswith("--"))  # the launcher adds some
    cfg = recipe.load(path, [f"engine.deepspeed={zero}", f"run={out}.run"])
    process_setup.init_distributed()
    build, waits = Builder(cfg), {}
    branches = {
        name: BranchEngine(name, build.module(name), cfg.engine, Path(out).parent)
        for name in ("pretrain", "sft")
    }
    for stage in cfg.stages:
        branch = branches[stage.branch]
        branch.enter(stage)
        with build.train_dataloader(stage, None) as stream:
            for number in range(3):  # ZeRO-3 traces the order of the parameters in the first ones
                branch.step([next(stream)], number)
            batch = next(stream)
            with HostReads() as reads:
                report = branch.step([batch], 3)
        waits[stage.name] = {
            "groups": len(stage.trains),
            "asked": dict(reads.by_caller),
            "norm": float(report.grad_norm),
        }
    Path(out).write_text(json.dumps(waits))
    distributed.end_process()


if __name__ == "__main__":
    main()
