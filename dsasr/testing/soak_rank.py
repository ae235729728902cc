"""One rank of a soak: train.py that stands still at a chosen place, for its killer to find it.

The place, the how-manieth time, and the folder in which ranks say where they are come in the
environment (`PLAN`). Nothing else differs from train.py: no number, no call.
"""

import os
import sys

if __name__ == "__main__":
    here = os.path.dirname(os.path.abspath(__file__))  # as in train.py
    sys.path[:] = [p for p in sys.path if os.path.abspath(p or os.getcwd()) != here]
    sys.path.insert(0, os.path.dirname(os.path.dirname(here)))

import functools
import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dsasr.utils.errors import run_tool
from dsasr.utils.io import atomic_write

PLAN = "DSASR_SOAK"
# Loaded once by the server that the ranks are forked from.
PRELOAD = [
    "dsasr.testing.soak_rank",
    "dsasr.train",
    "dsasr.training.trainer",
    "dsasr.tracking.timeline_plot",
    "deepspeed",
]
PATIENCE = 120.0  # seconds to stand still without being killed


@dataclass(frozen=True)
class Plan:
    """Where rank ``rank`` of one job is to stand still; its ranks speak in ``folder``."""

    folder: str
    place: str = ""  # "": nowhere
    count: int = 1  # the so-manieth time that it comes by
    limit: int = 0  # at the latest at the turn after so many steps; 0: no limit
    rank: int = 0

    def environment(self) -> dict[str, str]:
        return {PLAN: json.dumps(asdict(self))}


class Halts:
    """Tells where this rank is, and stands still once, where the plan says so."""

    def __init__(self, plan: Plan, rank: int):
        self.plan, self._rank = plan, rank
        self._lock = threading.Lock()
        self._passed, self._over = 0, plan.rank != rank
        name = Path(plan.folder) / f"rank-{rank}"
        self._file = os.open(name, os.O_CREAT | os.O_WRONLY, 0o644)
        self.at("start")

    def at(self, place: str, step: int = 0) -> None:
        """This rank is at ``place``; ``step``: so many steps are done, if it is a turn."""
        words = f"{os.getpid()} {os.getppid()} {place}"
        os.pwrite(self._file, words.ljust(64).encode(), 0)
        plan = self.plan
        with self._lock:
            self._passed += place == plan.place
            reached = place == plan.place and self._passed >= plan.count
            late = place == "turn" and plan.limit and step >= plan.limit
            stand = not self._over and (reached or late)
            self._over |= bool(stand)
        if stand:
            atomic_write(Path(plan.folder) / "halted", json.dumps({"place": place}))
            time.sleep(PATIENCE)

    def around(self, act: Callable, place: str | Callable[..., str]) -> Callable:
        """``act`` that says so before and after it, on whatever thread it runs."""

        @functools.wraps(act)
        def told(*args: Any, **named: Any) -> Any:
            here = place(*args) if callable(place) else place
            self.at(here)
            result = act(*args, **named)
            self.at(here)
            return result

        return told


def _written(path: Path, *_: Any) -> str:
    """Of a file or folder of fragments: whether a checkpoint's or a snapshot's."""
    return "save" if "checkpoints" in Path(path).parts else "publish"


def install(halts: Halts) -> None:
    """Have the parts of a run tell where they are."""
    from dsasr.checkpoint import tensor_fragments
    from dsasr.engine import branch_engine
    from dsasr.launch.watchdog import Watchdog

    note = Watchdog.at

    @functools.wraps(note)
    def at(dog: Watchdog, doing: str, stage: str = "", step: int = 0, keys: Sequence[str] = ()):
        note(dog, doing, stage, step, keys)
        halts.at("save" if doing == "checkpoint" else doing, step)

    Watchdog.at = at
    branch_engine.init_distributed = halts.around(branch_engine.init_distributed, "start")
    branch_engine.BranchEngine.load = halts.around(branch_engine.BranchEngine.load, "load")
    branch_engine.BranchEngine.load_encoder = halts.around(
        branch_engine.BranchEngine.load_encoder, "swap"
    )
    tensor_fragments.write_file = halts.around(tensor_fragments.write_file, _written)
    tensor_fragments.replace_folder = halts.around(tensor_fragments.replace_folder, _written)


def main() -> int:
    from dsasr import train

    plan = Plan(**json.loads(os.environ[PLAN]))
    install(Halts(plan, int(os.environ["RANK"])))
    return train.main_once()


def forked(arguments: Sequence[str], environment: Mapping[str, str], log: str) -> None:
    """`main` in a process forked from one that has imported everything."""
    from dsasr.launch.orphan_ranks import end_with_parents

    with open(log, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    end_with_parents()
    os.environ.update(environment)
    sys.argv = ["train.py", *arguments]
    sys.exit(run_tool(main))


if __name__ == "__main__":
    from dsasr.utils import distributed

    distributed.end_process(run_tool(main))
