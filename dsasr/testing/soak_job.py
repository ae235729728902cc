"""One start of a soak test's job: its ranks, their phases, how they are killed and end.

Ranks are forked from a process that has imported everything, so that a start is fast; ranks whose
launcher is killed are started by it, as a user's are.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from dsasr.testing import soak_rank
from dsasr.testing.soak_rank import PAUSED, PausePlan

PROGRAM = Path(__file__).parent / "soak_rank.py"
# Until forked ranks are killed whose companion was. The launcher waits as long after its SIGTERM: a
# rank that is making a process group sees neither that signal nor the end of the other.
SURVIVOR_SECONDS = 30.0


class Job:
    """One start of a job: ``world`` ranks, forked or under the launcher, with a common log file."""

    def __init__(
        self,
        arguments: Sequence[str],
        world: int,
        log: Path,
        plan: PausePlan,
        launched: bool = False,
    ):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.plan, self.world, self.log, self.began = plan, world, log, time.monotonic()
        self.folder = Path(plan.folder)
        self.folder.mkdir(parents=True)
        self._launcher: subprocess.Popen | None = None
        self._ranks: list = []
        if launched:
            self._launch(arguments)
        else:
            self._fork(arguments)

    def _fork(self, arguments: Sequence[str]) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(soak_rank.PRELOAD)
        shared = {
            **self.plan.environment(),
            "WORLD_SIZE": str(self.world),
            "LOCAL_WORLD_SIZE": str(self.world),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self.port),
        }
        for rank in range(self.world):
            env = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            process = context.Process(
                target=soak_rank.forked, args=(list(arguments), env, str(self.log))
            )
            process.start()
            self._ranks.append(process)

    def _launch(self, arguments: Sequence[str]) -> None:
        root = str(Path(__file__).parents[2])
        command = [
            *(sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(self.world)),
            *("--master_port", str(self.port), str(PROGRAM), *arguments),
        ]
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
        env = {**os.environ, **self.plan.environment(), "PATH": path, "PYTHONPATH": root}
        with open(self.log, "ab") as file:
            self._launcher = subprocess.Popen(command, stdout=file, stderr=file, env=env)

    # -- status of its ranks -----------------------------------------------------------------

    def rank_status(self, rank: int) -> tuple[int, int, str] | None:
        """Process id, parent's id and phase that a rank last reported; None: nothing yet."""
        try:
            pid, parent, phase, *_ = (
                (self.folder / f"rank-{rank}").read_text(encoding="utf-8").split()
            )
            return int(pid), int(parent), phase
        except (OSError, ValueError):
            return None

    @property
    def paused_phase(self) -> str | None:
        """The phase that a rank is paused in, if one is."""
        try:
            return json.loads((self.folder / PAUSED).read_text(encoding="utf-8"))["phase"]
        except (OSError, ValueError):
            return None

    def _pids(self) -> list[int]:
        """Process ids of the ranks that have reported."""
        return [s[0] for r in range(self.world) if (s := self.rank_status(r)) is not None]

    @property
    def running(self) -> bool:
        if self._launcher is not None:
            return self._launcher.poll() is None or any(map(_alive, self._pids()))
        return any(p.is_alive() for p in self._ranks)

    # -- its end -----------------------------------------------------------------------------

    def kill(self, target: str) -> str:
        """``kill -9`` of the target's processes; returns the phase that the job was in."""
        phase = self.paused_phase or (self.rank_status(self.plan.rank) or (0, 0, "start"))[2]
        if target == "rank":
            pids = [self._pid_of(self.plan.rank)]
        elif target == "node":
            pids = [self._pid_of(rank) for rank in range(self.world)]
        elif target == "launcher":
            statuses = map(self.rank_status, range(self.world))
            pids = [status[1] for status in statuses if status is not None][:1]
        else:
            pids = [self._launcher.pid]
        for pid in filter(None, pids):
            _kill(pid)
        return phase

    def _pid_of(self, rank: int) -> int | None:
        if self._ranks:
            return self._ranks[rank].pid
        status = self.rank_status(rank)
        return status[0] if status is not None else None

    def wait(self, seconds: float) -> list[int] | None:
        """Exit codes; None when a process still runs after ``seconds`` (it is killed then)."""
        end, hung = time.monotonic() + seconds, False
        alone_until: float | None = None
        while self.running:
            if any(rank.exitcode for rank in self._ranks):
                alone_until = alone_until or time.monotonic() + SURVIVOR_SECONDS
                if time.monotonic() > alone_until:
                    self.kill("node")
            if time.monotonic() > end:
                hung = True
                self.kill("node")
                if self._launcher is not None:
                    self._launcher.kill()
            time.sleep(0.02)
        for buffer in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{self.port}_*"):
            buffer.unlink(missing_ok=True)  # 66 MiB a rank, left by killed ones
        if hung:
            return None
        if self._launcher is not None:
            return [self._launcher.wait()]
        for process in self._ranks:
            process.join()
        return [process.exitcode for process in self._ranks]


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _alive(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"
