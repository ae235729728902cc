"""A run that is killed again and again, against one that is not: law 2 and law 3 under fire.

What is killed with ``kill -9``: one rank, all of them as a dying node does, DeepSpeed's launcher,
or the ``deepspeed`` command above it. Where: at any moment, or while the rank stands still at a
place of its own choosing (`soak_rank`): in its start, between two halves of a save, a swap
or a publication, in an evaluation … In the end weights, masters, moments and the cursors of the
data must equal the uninterrupted run's bit for bit, and so must every line of its metrics and of
its ledger, in which each epoch has each sample exactly once.

Ranks are forked from a process that has imported everything, which makes a start cheap; those
whose launcher is to be killed are started by it, as a user's are.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import random
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

from dsasr import recipe
from dsasr.testing import soak_rank
from dsasr.testing.soak_check import balance, differences, finished, newest_steps, repeated
from dsasr.testing.soak_rank import Plan
from dsasr.tracking import swap_replay
from dsasr.utils.errors import UserError

PROGRAM = Path(__file__).parent / "soak_rank.py"
TARGETS = ("rank", "node", "rank", "node", "rank", "node", "launcher", "rank", "node", "command")
# Where to kill, and how often a life may come by before it is killed there. Any: by the clock.
PLACES = {
    "save": 4, "swap": 2, "evaluation": 4, "any": 1, "publish": 3, "step": 8, "stage": 2,
    "start": 3, "drift": 2, "load": 1, "data": 8, "turn": 8,
}  # fmt: skip
SELDOM = ("swap", "publish", "drift", "evaluation")
ABSENT = {"pretrain": {"swap"}, "sft": {"publish", "drift"}, "both": set()}
Card = tuple[str, str]  # whom to kill, and where


@dataclass
class Verdict:
    """What a soak has found. ``faults`` is empty when all is well."""

    kills: Counter = field(default_factory=Counter)  # (branch, target, place) → how often
    starts: int = 0
    steps: int = 0  # of the killed run's ledger, and the samples and whole epochs in it
    samples: int = 0
    epochs: int = 0
    seconds: float = 0.0
    faults: list[str] = field(default_factory=list)

    def by(self, position: int) -> dict[str, int]:
        """How many kills by branch (0), target (1) or place (2)."""
        counts: Counter[str] = Counter()
        for key, number in self.kills.items():
            counts[key[position]] += number
        return dict(counts.most_common())


class Job:
    """One life of a job: ``world`` ranks, forked or under the launcher, and their common log."""

    def __init__(
        self, arguments: Sequence[str], world: int, log: Path, plan: Plan, launched: bool = False
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
            own = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            process = context.Process(
                target=soak_rank.forked, args=(list(arguments), own, str(self.log))
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
        own = {**os.environ, **self.plan.environment(), "PATH": path, "PYTHONPATH": root}
        with open(self.log, "ab") as file:
            self._launcher = subprocess.Popen(command, stdout=file, stderr=file, env=own)

    # -- where its ranks are -----------------------------------------------------------------

    def said(self, rank: int) -> tuple[int, int, str] | None:
        """Process, parent and place of a rank, as it last said; None: not a word yet."""
        try:
            words = (self.folder / f"rank-{rank}").read_text(encoding="utf-8").split()
            return int(words[0]), int(words[1]), words[2]
        except (OSError, ValueError, IndexError):
            return None

    @property
    def halted(self) -> str | None:
        """The place where a rank stands still."""
        try:
            return json.loads((self.folder / "halted").read_text(encoding="utf-8"))["place"]
        except (OSError, ValueError):
            return None

    def _processes(self) -> list[int]:
        """Of the ranks that have said a word."""
        return [held[0] for r in range(self.world) if (held := self.said(r)) is not None]

    @property
    def running(self) -> bool:
        if self._launcher is not None:
            return self._launcher.poll() is None or any(map(_alive, self._processes()))
        return any(p.is_alive() for p in self._ranks)

    # -- its end -----------------------------------------------------------------------------

    def kill(self, target: str) -> str:
        """``kill -9``; returns the place that it fell on."""
        place = self.halted or (self.said(self.plan.rank) or (0, 0, "start"))[2]
        if target == "rank":
            doomed = [self._of(self.plan.rank)]
        elif target == "node":
            doomed = [self._of(rank) for rank in range(self.world)]
        elif target == "launcher":
            doomed = [held[1] for r in range(self.world) if (held := self.said(r)) is not None][:1]
        else:
            doomed = [self._launcher.pid]
        for process in filter(None, doomed):
            _kill(process)
        return place

    def _of(self, rank: int) -> int | None:
        if self._ranks:
            return self._ranks[rank].pid
        held = self.said(rank)
        return held[0] if held is not None else None

    def wait(self, seconds: float) -> list[int] | None:
        """Exit codes; None when something still ran after ``seconds`` (it is killed then)."""
        end, hung = time.monotonic() + seconds, False
        while self.running:
            if time.monotonic() > end:
                hung = True
                self.kill("node")
                if self._launcher is not None:
                    self._launcher.kill()
            time.sleep(0.02)
        for left in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{self.port}_*"):
            left.unlink(missing_ok=True)  # 66 MiB a rank, which killed ones leave behind
        if hung:
            return None
        if self._launcher is not None:
            return [self._launcher.wait()]
        for process in self._ranks:
            process.join()
        return [process.exitcode for process in self._ranks]


def _kill(process: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)


def _alive(process: int) -> bool:
    try:
        held = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return held.rpartition(")")[2].split()[0] not in "ZX"


class Soak:
    """One soak below ``folder``; `soak` runs it."""

    def __init__(self, name: str, overrides: Sequence[str], folder: Path, world: int, seed: int,
                 concurrent: bool, patience: float, tell: Callable[[str], Any]):  # fmt: skip
        # A rank may be killed where the others wait for it without a word; the watchdog's limit,
        # and the process group's above it, must end that before patience does.
        limits = [f"watchdog.{k}={patience / 4:g}" for k in ("seconds", "start_seconds")]
        given = [*limits, *overrides, "monitor.ledger=true"]
        self.arguments = ["--recipe", name, *given]
        self.recipe = recipe.load(name, given)
        self.folder, self.world, self.patience, self.tell = folder, world, patience, tell
        self.calm, self.run = folder / "calm", folder / "killed"
        self.draw, self.verdict = random.Random(seed), Verdict()
        self.branches = ["pretrain", "sft"] if concurrent else ["both"]
        self.concurrent, self._lives = concurrent, 0
        self.length = 0.0  # seconds, of the undisturbed run

    def place(self, branch: str) -> Path:
        return self.run if branch == "both" else self.run / branch

    def total(self, branch: str) -> int:
        """Optimizer steps of a job."""
        stages = self.recipe.stages
        return sum(s.steps for s in stages if branch in ("both", s.branch))

    def job(self, name: str, run: Path, *more: str, launched: bool = False, **plan: Any) -> Job:
        self._lives += 1
        held = Plan(str(self.folder / "lives" / f"{self._lives:04d}"), **plan)
        given = [*self.arguments, f"run={run}", *more]
        return Job(given, self.world, self.folder / f"{name}.log", held, launched)

    def undisturbed(self) -> None:
        """The run to compare with; of a concurrent soak, its pretrain branch."""
        began = time.monotonic()
        job = self.job("calm", self.calm, f"branch={self.branches[0]}")
        codes = job.wait(self.patience)
        if codes != [0] * self.world:
            raise UserError(f"the undisturbed run failed ({codes}): see {self.folder}/calm.log")
        self.length = time.monotonic() - began

    def start(self, branch: str, cards: Sequence[Card]) -> Job:
        """The next life of a job, to end as the first of ``cards`` says."""
        self.verdict.starts += 1
        name, more = f"killed-{branch}", f"branch={branch}"
        if not cards:
            return self.job(name, self.run, more)
        target, place = cards[0]
        done, total = newest_steps(self.place(branch)), self.total(branch)
        # Progress is for all cards, and none may be left when the run is over.
        rope = max(6, (9 if place in SELDOM else 3) * (total - done) // len(cards))
        return self.job(
            name, self.run, more,
            launched=target in ("launcher", "command"),
            place=place if place != "any" else "",
            count=self.draw.randint(1, PLACES.get(place, 1)),
            limit=min(done + rope, total - 1),
            rank=self.draw.randrange(self.world),
        )  # fmt: skip

    def under_fire(self, decks: dict[str, list[Card]]) -> None:
        """Kill until the decks are through, then let the jobs end."""
        jobs = {branch: self.start(branch, decks[branch]) for branch in self.branches}
        moments = {branch: self._moment() for branch in jobs}
        while jobs:
            time.sleep(0.01)
            for branch, job in list(jobs.items()):
                deck, verdict = decks[branch], self.verdict
                age = time.monotonic() - job.began
                by_clock = bool(deck) and deck[0][1] == "any" and age > moments[branch]
                if deck and (job.halted or by_clock) and job.running:
                    target = deck.pop(0)[0]
                    # Also a kill by the clock waits for a launcher's ranks: they are to be orphans.
                    fell = job.kill(target)
                    verdict.kills[branch, target, fell] += 1
                    self.tell(f"kill {sum(verdict.kills.values())}: {branch}, {target}, in {fell}")
                    if job.wait(self.patience) is None:
                        fault = f"life {job.folder.name}: hung after a killed {target} in {fell}"
                        verdict.faults.append(fault)
                    jobs[branch], moments[branch] = self.start(branch, deck), self._moment()
                elif not job.running:
                    codes = job.wait(1.0)
                    if not finished(self.place(branch)):
                        verdict.faults.append(f"{branch} ended by itself ({codes}): see {job.log}")
                    elif deck:
                        verdict.faults.append(f"{branch} was over with {len(deck)} kills to go")
                    del jobs[branch]
                elif age > self.patience:
                    verdict.faults.append(f"life {job.folder.name} of {branch} never ended")
                    job.wait(0.0)

    def _moment(self) -> float:
        return self.draw.uniform(0.0, self.length / 4)

    def compare(self) -> None:
        first, verdict = self.branches[0], self.verdict
        for branch in self.branches:
            if not finished(self.place(branch)):
                verdict.faults.append(f"{branch} never finished")
                return
        self.tell("comparing")
        calm = self.calm / first if self.concurrent else self.calm
        verdict.faults += differences(calm, self.place(first))
        if self.concurrent:
            again = self.folder / "repeated"
            job = self.job("repeated", again, *swap_replay.overrides(self.run / "sft"))
            codes = job.wait(self.patience)
            if codes != [0] * self.world:
                verdict.faults.append(f"the repeated run failed ({codes}): see {job.log}")
                return
            verdict.faults += repeated(again, self.run / "sft")
        for branch in self.branches:
            held = balance(self.place(branch), self.recipe)
            verdict.faults += held.faults
            verdict.steps += held.steps
            verdict.samples += held.samples
            verdict.epochs += held.epochs


def deal(branches: Sequence[str], kills: int, draw: random.Random) -> dict[str, list[Card]]:
    """A deck for each job: all targets and places in turn, shuffled."""
    decks: dict[str, list[Card]] = {}
    for number, branch in enumerate(branches):
        places = [p for p in PLACES if p not in ABSENT[branch]]
        count = kills // len(branches) + (number < kills % len(branches))
        targets = [TARGETS[i % len(TARGETS)] for i in range(count)]
        where = [places[i % len(places)] for i in range(count)]
        draw.shuffle(targets)
        draw.shuffle(where)
        # A launcher is killed above ranks that are there: they must have said where they are.
        deck = list(zip(targets, where, strict=True))
        decks[branch] = [
            (t, "turn" if t in ("launcher", "command") and p == "any" else p) for t, p in deck
        ]
    return decks


def soak(
    name: str,
    overrides: Sequence[str],
    folder: Path,
    *,
    kills: int,
    world: int,
    seed: int,
    concurrent: bool = False,
    patience: float = 900.0,
    decks: dict[str, list[Card]] | None = None,
    tell: Callable[[str], Any] = print,
) -> Verdict:
    """Train recipe ``name`` twice below ``folder``, once undisturbed and once killed ``kills``
    times.

    ``concurrent``: as two jobs; the undisturbed run is then of the pretrain branch, and the sft
    branch is held to one job that repeats its swaps. ``patience``: seconds that a job may take to
    its end, and its ranks to die after a kill. ``decks``: whom to kill where, instead of what
    ``kills`` and ``seed`` deal.
    """
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} holds a soak already, or something else: give a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    one = Soak(name, overrides, folder, world, seed, concurrent, patience, tell)
    tell("the undisturbed run")
    one.undisturbed()
    one.under_fire(decks or deal(one.branches, kills, one.draw))
    one.compare()
    one.verdict.seconds = time.monotonic() - began
    return one.verdict
