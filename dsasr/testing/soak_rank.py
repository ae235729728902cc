"""One rank of a soak test: train.py that reports its phase, and pauses in one to be killed there.

The phase, at which entry into it, and the folder for the reports come in the environment variable
`PAUSE_PLAN`. Otherwise a rank is that of train.py: the same values, the same calls.
"""

import os
import sys

if __name__ == "__main__":
    here = os.path.dirname(os.path.abspath(__file__))  # as in train.py
    sys.path[:] = [p for p in sys.path if os.path.abspath(p or os.getcwd()) != here]
    sys.path.insert(0, os.path.dirname(os.path.dirname(here)))

import errno
import functools
import json
import random
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dsasr.utils.errors import run_tool
from dsasr.utils.io import atomic_write

PAUSE_PLAN = "DSASR_SOAK"
PAUSED = "paused"  # file in the plan's folder
# Imported once by the server that the ranks are forked from.
PRELOAD = [
    "dsasr.testing.soak_rank",
    "dsasr.train",
    "dsasr.training.trainer",
    "dsasr.tracking.timeline_plot",
    "deepspeed",
    "deepspeed.runtime.zero.muon.muon_optimizer",  # imported by its first engine
    "matplotlib.figure",
]
PAUSE_SECONDS = 120.0  # of a pause, if no kill ends it


@dataclass(frozen=True)
class PausePlan:
    """When rank ``rank`` of a job pauses; all its ranks report to ``folder``."""

    folder: str
    phase: str = ""  # "": no pause
    count: int = 1  # at this entry into the phase
    limit: int = 0  # at the latest at the turn after this many steps; 0: no limit
    rank: int = 0
    disk: str = ""  # slow: a file of a checkpoint takes seconds; full: some cannot be written
    disk_until: int = 0  # a full disk has room again from this step on, so that the run can end

    def environment(self) -> dict[str, str]:
        return {PAUSE_PLAN: json.dumps(asdict(self))}


class PhaseReporter:
    """Reports the phase of this rank, and pauses it once, as planned."""

    def __init__(self, plan: PausePlan, rank: int):
        self.plan = plan
        self._lock = threading.Lock()
        self._entries, self._paused = 0, plan.rank != rank
        self._file = os.open(Path(plan.folder) / f"rank-{rank}", os.O_CREAT | os.O_WRONLY, 0o644)
        self.enter("start")

    def enter(self, phase: str, step: int = 0) -> None:
        """This rank enters ``phase``; ``step``: steps done, if it is a turn."""
        status = f"{os.getpid()} {os.getppid()} {phase}"
        os.pwrite(self._file, status.ljust(64).encode(), 0)
        plan = self.plan
        with self._lock:
            self._entries += phase == plan.phase
            reached = phase == plan.phase and self._entries >= plan.count
            late = phase == "turn" and plan.limit and step >= plan.limit
            pause = not self._paused and (reached or late)
            self._paused |= bool(pause)
        if pause:
            atomic_write(Path(plan.folder) / PAUSED, json.dumps({"phase": phase}))
            time.sleep(PAUSE_SECONDS)

    def reporting(self, function: Callable, phase: str | Callable[..., str]) -> Callable:
        """``function`` that enters ``phase`` before and after its call, on whatever thread."""

        @functools.wraps(function)
        def call(*args: Any, **named: Any) -> Any:
            current = phase(*args) if callable(phase) else phase
            self.enter(current)
            result = function(*args, **named)
            self.enter(current)
            return result

        return call


def _phase_of(path: Path, *_: Any) -> str:
    """The phase that writes a file or folder of fragments: a checkpoint's or a snapshot's."""
    return "save" if "checkpoints" in Path(path).parts else "publish"


SLOW_SECONDS = 0.5  # of a file, at most, on a slow disk
FULL_SHARE = 0.3  # of the files of checkpoints that a full disk cannot take


def with_disk(write_file: Callable[..., str], plan: PausePlan) -> Callable[..., str]:
    """``write_file`` on a disk that is slow, or full at times: half a file is written then."""
    rng = random.Random()

    @functools.wraps(write_file)
    def write(path: Path, *args: Any) -> str:
        if plan.disk == "slow":
            time.sleep(rng.uniform(0.0, SLOW_SECONDS))
        written = write_file(path, *args)
        if plan.disk == "slow":
            time.sleep(rng.uniform(0.0, SLOW_SECONDS))
        folder = re.search(r"step-(\d+)", str(path))
        early = folder is not None and int(folder[1]) < plan.disk_until
        if plan.disk == "full" and early and rng.random() < FULL_SHARE:
            os.truncate(path, path.stat().st_size // 2)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return written

    return write


def install(reporter: PhaseReporter) -> None:
    """Have the parts of a run report their phases."""
    from dsasr.checkpoint import tensor_fragments
    from dsasr.engine import branch_engine, process_setup
    from dsasr.launch import orphan_ranks
    from dsasr.launch.watchdog import Watchdog

    orphan_ranks.STOP_SECONDS = 5.0  # a paused rank keeps the others from agreeing to stop
    watchdog_at = Watchdog.at

    @functools.wraps(watchdog_at)
    def at(
        watchdog: Watchdog, doing: str, stage: str = "", step: int = 0, keys: Sequence[str] = ()
    ):
        watchdog_at(watchdog, doing, stage, step, keys)
        reporter.enter("save" if doing == "checkpoint" else doing, step)

    Watchdog.at = at
    process_setup.init_distributed = reporter.reporting(process_setup.init_distributed, "start")
    branch_engine.BranchEngine.load = reporter.reporting(branch_engine.BranchEngine.load, "load")
    branch_engine.BranchEngine.load_encoder = reporter.reporting(
        branch_engine.BranchEngine.load_encoder, "swap"
    )
    write_file = with_disk(tensor_fragments.write_file, reporter.plan)
    tensor_fragments.write_file = reporter.reporting(write_file, _phase_of)
    tensor_fragments.replace_folder = reporter.reporting(tensor_fragments.replace_folder, _phase_of)


def main() -> int:
    from dsasr import train

    plan = PausePlan(**json.loads(os.environ[PAUSE_PLAN]))
    install(PhaseReporter(plan, int(os.environ["RANK"])))
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
