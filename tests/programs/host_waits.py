"""Where in a step values are asked for, by stage: ``host_waits.py RECIPE OUT ZERO``, one rank.

On a GPU each would be a wait, unless the tensor lies on the host. That the model asks for none of
the device's is tests/model/test_waits.py's to show; here it is what the engine adds.
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
from dsasr.engine import branch_engine
from dsasr.engine.branch_engine import BranchEngine
from dsasr.utils import distributed

WAITS = ("_local_scalar_dense", "nonzero", "equal", "masked_select", "unique")


class Asked(TorchDispatchMode):
    """Counts operations whose result's value or shape the host needs, by who called them."""

    def __init__(self):
        super().__init__()
        self.by: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name.removeprefix("aten::") in WAITS:
            self.by[caller()] += 1
        return func(*args, **(kwargs or {}))


ROOTS = [Path(package.__file__).parent for package in (deepspeed, transformers, dsasr)]


def caller() -> str:
    """The innermost of our own, DeepSpeed's or transformers' functions on the stack."""
    for frame in reversed(traceback.extract_stack()[:-2]):
        for root in ROOTS:  # not by name: the virtual environment may lie in a folder called dsasr
            if Path(frame.filename).is_relative_to(root):
                inner = Path(frame.filename).relative_to(root.parent)
                return f"{inner.as_posix()}:{frame.name}"
    return "elsewhere"


def main() -> None:
    path, out, zero = (a for a in sys.argv[1:] if not a.startswith("--"))  # the launcher adds some
    chosen = recipe.load(path, [f"engine.deepspeed={zero}", f"run={out}.run"])
    branch_engine.init_distributed()
    build, found = Builder(chosen), {}
    branches = {
        name: BranchEngine(name, build.module(name), chosen.engine, Path(out).parent)
        for name in ("pretrain", "sft")
    }
    for stage in chosen.stages:
        branch = branches[stage.branch]
        branch.enter(stage)
        with build.train_dataloader(stage, None) as stream:
            for number in range(3):  # ZeRO-3 learns in the first ones what is used when
                branch.step([next(stream)], number)
            batch = next(stream)
            with Asked() as asked:
                report = branch.step([batch], 3)
        found[stage.name] = {
            "groups": len(stage.trains),
            "asked": dict(asked.by),
            "norm": float(report.grad_norm),
        }
    Path(out).write_text(json.dumps(found))
    distributed.end_process()


if __name__ == "__main__":
    main()
