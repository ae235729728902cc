"""A run that is killed again and again, against one that is not: law 2 and law 3 under fire.

Ranks are started as the launcher would start them and killed with ``kill -9``: one rank, or all
of them as a dying node does, after a while or in the middle of something (a save, a swap, a
published encoder, an evaluation, a stage's start). In the end weights, masters, moments and the
cursors of the data must equal the uninterrupted run's bit for bit, and so must every line of its
metrics. The ledger of samples must be the same too, and hold each sample of an epoch once.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from dsasr import fragments, history
from dsasr.errors import UserError
from dsasr.fragments import FragmentReader
from dsasr.monitor import LEDGER, METRICS

TRAIN = Path(__file__).parent / "train.py"
# The moments to kill at, and the line of the log (an expression) that tells of each.
MOMENTS = {
    "step": r"\[\d+/\d+\] ", "checkpoint": "— checkpoint:", "published": "— published:",
    "swap": "— swap:", "evaluation": "— (stage_end|evaluated):", "stage": "— stage:", "start": "",
}  # fmt: skip
ABSENT = {"pretrain": {"swap"}, "sft": {"published"}, "both": set()}  # from a branch's log
CLOCK = re.compile(r"seconds|_per_|_share|queue")  # metrics that depend on the clock


@dataclass
class Verdict:
    """What a soak has found. ``faults`` is empty when all is well."""

    kills: Counter = field(default_factory=Counter)  # (moment, target) → how often
    starts: int = 0
    faults: list[str] = field(default_factory=list)


class Ranks:
    """One job: ``world`` processes of train.py and their common log."""

    def __init__(self, arguments: Sequence[str], world: int, log: Path):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        shared = {
            **os.environ,
            "WORLD_SIZE": str(world),
            "LOCAL_WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        self.port = port
        self.log, self.seen = log, log.stat().st_size if log.is_file() else 0
        with open(log, "ab") as file:
            self.processes = [
                subprocess.Popen(
                    [sys.executable, str(TRAIN), *arguments], stdout=file, stderr=file,
                    env={**shared, "RANK": str(r), "LOCAL_RANK": str(r)},
                )
                for r in range(world)
            ]  # fmt: skip

    def until(self, expression: str, seconds: float) -> bool:
        """Wait for a match in what this job logs; False when it ended, or ``seconds`` are over."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            with open(self.log, "rb") as file:
                file.seek(self.seen)
                if re.search(expression, file.read().decode("utf-8", "replace")):
                    return True
            if not self.running:
                return False
            time.sleep(0.02)
        return False

    @property
    def running(self) -> bool:
        return any(p.poll() is None for p in self.processes)

    def kill(self, chosen: Sequence[int]) -> None:
        for rank in chosen:
            if self.processes[rank].poll() is None:
                self.processes[rank].send_signal(signal.SIGKILL)

    def wait(self, seconds: float) -> list[int] | None:
        """Exit codes; None when a rank still ran after ``seconds`` (it is killed then)."""
        end, hung = time.monotonic() + seconds, False
        for process in self.processes:
            try:
                process.wait(max(end - time.monotonic(), 0.1))
            except subprocess.TimeoutExpired:
                hung = True
                process.kill()
                process.wait()
        for left in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{self.port}_*"):
            left.unlink(missing_ok=True)  # 66 MiB a rank, which killed ones leave behind
        return None if hung else [p.returncode for p in self.processes]


@dataclass(frozen=True)
class Pace:
    """Seconds, of the undisturbed run: to its first step, and of its training for each kill. No
    kill may wait longer, or the run is over before all are made."""

    begins: float
    a_kill: float


def await_moment(job: Ranks, branch: str, draw: random.Random, pace: Pace) -> str:
    """Wait until a moment that is drawn has come in ``job``; its name, or ``late``."""
    moment = draw.choice([m for m in MOMENTS if m not in ABSENT[branch]])
    if moment == "start":
        time.sleep(draw.uniform(0, pace.begins))
    elif not (
        job.until(MOMENTS["step"], 3 * pace.begins) and job.until(MOMENTS[moment], pace.a_kill)
    ):
        moment = "late"
    return moment


def soak(
    recipe: str,
    overrides: Sequence[str],
    folder: Path,
    *,
    kills: int,
    world: int,
    seed: int,
    concurrent: bool = False,
    patience: float = 900.0,
    linger: bool = True,
    tell: Callable[[str], Any] = print,
) -> Verdict:
    """Train ``recipe`` twice below ``folder``, once undisturbed and once killed ``kills`` times.

    ``concurrent``: as two jobs; the undisturbed run is then of the pretrain branch, and the sft
    branch is held to one job that repeats its swaps. ``patience``: seconds that a job may take to
    its end, and its ranks to die after a kill. ``linger``: kill also a while after the moment;
    without, the two runs are trained side by side.
    """
    verdict, draw = Verdict(), random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    calm, run = folder / "calm", folder / "killed"
    if calm.exists() or run.exists():
        raise UserError(f"{folder} holds a soak already: give a new folder")
    branches = ["pretrain", "sft"] if concurrent else ["both"]
    # A rank may be killed where the others wait for it without a word; the watchdog's limit, and
    # the process group's above it, must end that before patience does.
    limits = [f"watchdog.{k}={patience / 4:g}" for k in ("seconds", "start_seconds")]
    overrides = [*limits, "monitor.ledger=true", *overrides]
    common = ["--recipe", recipe, *overrides]
    tell("the undisturbed run")
    started = time.monotonic()
    given = [*common, f"run={calm}", f"branch={branches[0]}"]
    undisturbed = Ranks(given, world, folder / "calm.log")

    def settle() -> None:
        codes = undisturbed.wait(patience)
        if codes != [0] * world:
            raise UserError(f"the undisturbed run failed ({codes}): see {folder}/calm.log")

    pace = Pace(patience, patience)
    if linger:
        undisturbed.until(MOMENTS["step"], patience)
        begins = time.monotonic() - started
        settle()
        pace = Pace(begins, (time.monotonic() - started - begins) / kills)

    def start(branch: str) -> Ranks:
        verdict.starts += 1
        given = [*common, f"run={run}", f"branch={branch}"]
        return Ranks(given, world, folder / f"killed-{branch}.log")

    def place(branch: str) -> Path:
        return run if branch == "both" else run / branch

    jobs = {branch: start(branch) for branch in branches}
    while sum(verdict.kills.values()) < kills and jobs:
        branch = draw.choice(list(jobs))
        job = jobs[branch]
        moment = await_moment(job, branch, draw, pace)
        if linger:
            time.sleep(draw.choice([0.0, draw.uniform(0, 0.3), draw.uniform(0, pace.a_kill)]))
        if not job.running:
            if not finished(place(branch)):
                verdict.faults.append(f"{branch} ended by itself: see {job.log}")
            del jobs[branch]
            continue
        target = draw.choice(["rank", "node"])
        job.kill([draw.randrange(world)] if target == "rank" else range(world))
        verdict.kills[moment, target] += 1
        tell(f"kill {sum(verdict.kills.values())}/{kills}: {branch}, {target}, {moment}")
        if job.wait(patience) is None:
            verdict.faults.append(f"start {verdict.starts}: ranks hung after a killed {target}")
        jobs[branch] = start(branch)
    settle()
    for branch, job in jobs.items():
        codes = job.wait(patience)
        if codes != [0] * world:
            verdict.faults.append(f"the last start of {branch} failed ({codes}): see {job.log}")
    done = sum(verdict.kills.values())
    if done < kills:
        verdict.faults.append(f"over after {done} of {kills} kills: give the recipe more steps")
    for branch in branches:
        if not finished(place(branch)):
            verdict.faults.append(f"{branch} never finished")
            return verdict
    tell("comparing")
    first = branches[0]
    verdict.faults += differences(calm / first if concurrent else calm, place(first))
    if concurrent:
        verdict.faults += repeated(_lines(place("sft") / LEDGER))
        verdict.faults += repeats(run, recipe, overrides, world, patience)
    return verdict


def differences(calm: Path, run: Path) -> list[str]:
    """How the end of ``run`` differs from that of ``calm``."""
    found, one, other = [], _last(calm), _last(run)
    if one is None or other is None:
        return [f"{calm if one is None else run} has no whole checkpoint"]
    for key in ("steps", "progress", "streams", "branches"):
        if one.manifest[key] != other.manifest[key]:
            found.append(f"{key} of the last checkpoint")
    found += _weights(one, other, "")
    mine, theirs = _trace(calm), _trace(run)
    if len(mine) != len(theirs):
        found.append(f"{len(theirs)} lines of metrics instead of {len(mine)}")
    for number, (a, b) in enumerate(zip(mine, theirs, strict=False), 1):
        if a != b:
            keys = [k for k in a if a.get(k) != b.get(k)]
            found.append(f"line {number} of the metrics: {', '.join(keys)}")
            break
    mine, theirs = (_lines(r / LEDGER) for r in (calm, run))
    if mine != theirs:
        found.append("the ledger of samples")
    return found + repeated(theirs)


def repeated(ledger: Sequence[dict[str, Any]]) -> list[str]:
    """Faults of a ledger: a sample twice in an epoch of a stage's data, or, in an epoch that was
    followed by another, not at all."""
    epochs: dict[tuple[str, int], Counter] = {}
    for line in ledger:
        for of_rank in line["samples"]:
            for epoch, keys in of_rank:
                epochs.setdefault((line["stage"], epoch), Counter()).update(keys)
    found = []
    for (stage, epoch), held in epochs.items():
        twice = [key for key, count in held.items() if count > 1]
        every = {k for (s, _), keys in epochs.items() if s == stage for k in keys}
        missing = every - held.keys() if (stage, epoch + 1) in epochs else set()
        for what, keys in (("twice", twice), ("missing", missing)):
            if keys:
                found.append(f"{stage}, epoch {epoch}: {len(keys)} samples {what}: {min(keys)} …")
    return found


def _weights(one: FragmentReader, other: FragmentReader, prefix: str) -> list[str]:
    keys = {k for k in one.shapes if k.startswith(prefix)}
    if keys != {k for k in other.shapes if k.startswith(prefix)}:
        return ["the tensors of the last checkpoint"]
    return [k for k in sorted(keys) if not torch.equal(one.whole(k), other.whole(k))]


def repeats(
    run: Path, recipe: str, overrides: Sequence[str], world: int, patience: float
) -> list[str]:
    """Of a concurrent run: whether one job that takes the same encoders at the same steps ends with
    the same sft weights."""
    again, log = run.parent / "repeated", run.parent / "repeated.log"
    given = [*overrides, *history.overrides(run / "sft")]
    codes = Ranks(["--recipe", recipe, f"run={again}", *given], world, log).wait(patience)
    if codes != [0] * world:
        return [f"the repeated run failed ({codes}): see {log}"]
    one, other = _last(again), _last(run / "sft")
    if one is None or other is None:
        return ["a run without a whole checkpoint"]
    return _weights(one, other, "sft/")


def _last(run: Path) -> FragmentReader | None:
    for path in sorted((run / "checkpoints").glob("step-*"), reverse=True):
        try:
            fragments.verify(path)
            return FragmentReader(path)
        except fragments.FragmentError:
            continue
    return None


def finished(run: Path) -> bool:
    path = run / "events.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    try:
        return bool(lines) and json.loads(lines[-1])["event"] == "finished"
    except ValueError:
        return False


def _trace(run: Path) -> list[dict[str, str]]:
    """The metrics without what a clock said, NaN made comparable."""
    lines = _lines(run / METRICS)
    return [{k: repr(v) for k, v in line.items() if not CLOCK.search(k)} for line in lines]


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
