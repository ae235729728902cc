"""Soak test: a run that is killed again and again must equal one that is never killed.

Tests "Interrupted is uninterrupted" and "Exactly once". Killed with ``kill -9`` are one rank, all
ranks (a node that fails), DeepSpeed's launcher, or the ``deepspeed`` command above it: at a random
time, or while a rank is paused in a phase (`soak_rank`): its start, within a save, a swap or a
publication, an evaluation … At the end weights, masters, moments and the dataloaders' state must
equal the baseline run's bit for bit, and so must every line of its metrics and of its ledger, in
which each epoch has each sample exactly once.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dsasr import recipe
from dsasr.testing.soak_check import (
    check_ledger,
    differences,
    newest_checkpoint_steps,
    sft_differences,
)
from dsasr.testing.soak_job import Job
from dsasr.testing.soak_rank import PausePlan
from dsasr.tracking import swap_replay
from dsasr.tracking.run_log import is_finished
from dsasr.utils.errors import UserError

TARGETS = ("rank", "node", "rank", "node", "rank", "node", "launcher", "rank", "node", "command")
# Phase to kill in → how often a job may enter it, at most, before it is killed there ("any": at a
# random time).
PHASES = {
    "save": 4, "swap": 2, "evaluation": 4, "any": 1, "publish": 3, "step": 8, "stage": 2,
    "start": 3, "drift": 2, "load": 1, "data": 8, "turn": 8,
}  # fmt: skip
RARE_PHASES = ("swap", "publish", "drift", "evaluation")
ABSENT_PHASES = {"pretrain": {"swap"}, "sft": {"publish", "drift"}, "both": set()}
Kill = tuple[str, str]  # target, phase


@dataclass
class SoakResult:
    """The kills of a soak test and its faults; a test without faults has passed."""

    kills: Counter = field(default_factory=Counter)  # (branch, target, phase) → count
    starts: int = 0
    steps: int = 0  # in the killed run's ledger, as are samples and whole epochs
    samples: int = 0
    epochs: int = 0
    seconds: float = 0.0
    faults: list[str] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        """The counts as plain values, for a line of JSON."""
        return {
            "starts": self.starts,
            "by_target": self.kills_by(1),
            "by_phase": self.kills_by(2),
            "by_job": self.kills_by(0),
            "ledger": {x: getattr(self, x) for x in ("steps", "samples", "epochs")},
            "minutes": round(self.seconds / 60, 1),
            "faults": len(self.faults),
        }

    def kills_by(self, position: int) -> dict[str, int]:
        """Number of kills by branch (position 0), target (1) or phase (2)."""
        counts: Counter[str] = Counter()
        for key, number in self.kills.items():
            counts[key[position]] += number
        return dict(counts.most_common())


class Soak:
    """The state of one soak test below ``folder``; `soak` runs it."""

    def __init__(self, name: str, overrides: Sequence[str], folder: Path, world: int, seed: int,
                 concurrent: bool, patience: float, disk: str,
                 report: Callable[[str], Any]):  # fmt: skip
        # A rank may be killed where the others wait for it silently; the watchdog's limit, and the
        # process group's above it, must end that before ``patience`` does.
        limits = [f"watchdog.{k}={patience / 4:g}" for k in ("seconds", "start_seconds")]
        overrides = [*limits, *overrides, "monitor.ledger=true"]
        self.arguments = ["--recipe", name, *overrides]
        self.recipe = recipe.load(name, overrides)
        self.folder, self.world, self.patience, self.report = folder, world, patience, report
        self.baseline, self.killed = folder / "baseline", folder / "killed"
        self.rng, self.result = random.Random(seed), SoakResult()
        self.branches = ["pretrain", "sft"] if concurrent else ["both"]
        self.concurrent, self.disk, self._starts = concurrent, disk, 0
        self.baseline_seconds = 0.0

    def killed_folder(self, branch: str) -> Path:
        """The run folder of the killed job."""
        return self.killed if branch == "both" else self.killed / branch

    def total_steps(self, branch: str) -> int:
        """Optimizer steps of a job."""
        stages = self.recipe.stages
        return sum(s.steps for s in stages if branch in ("both", s.branch))

    def start_job(
        self, name: str, run: Path, *overrides: str, launched: bool = False, **plan: Any
    ) -> Job:
        self._starts += 1
        pause_plan = PausePlan(str(self.folder / "starts" / f"{self._starts:04d}"), **plan)
        arguments = [*self.arguments, f"run={run}", *overrides]
        return Job(arguments, self.world, self.folder / f"{name}.log", pause_plan, launched)

    def run_baseline(self) -> None:
        """Train the run to compare with; in a concurrent soak test, its pretrain branch."""
        began = time.monotonic()
        job = self.start_job("baseline", self.baseline, f"branch={self.branches[0]}")
        codes = job.wait(self.patience)
        if codes != [0] * self.world:
            raise UserError(f"the baseline run failed ({codes}): see {job.log}")
        self.baseline_seconds = time.monotonic() - began

    def start_killed(self, branch: str, kills: Sequence[Kill]) -> Job:
        """Start the killed job again, to be killed as the first of ``kills`` says."""
        self.result.starts += 1
        name, override = f"killed-{branch}", f"branch={branch}"
        total = self.total_steps(branch)
        disk = {"disk": self.disk, "disk_until": total}
        if not kills:
            return self.start_job(name, self.killed, override, **disk)
        target, phase = kills[0]
        done = newest_checkpoint_steps(self.killed_folder(branch))
        # Each kill gets its share of the steps left, so that none remains when the run ends.
        step_budget = max(6, (9 if phase in RARE_PHASES else 3) * (total - done) // len(kills))
        return self.start_job(
            name, self.killed, override,
            launched=target in ("launcher", "command"),
            phase=phase if phase != "any" else "",
            count=self.rng.randint(1, PHASES.get(phase, 1)),
            limit=min(done + step_budget, total - 1),
            rank=self.rng.randrange(self.world),
            **disk,
        )  # fmt: skip

    def run_with_kills(self, kill_plans: dict[str, list[Kill]]) -> None:
        """Kill each branch's job by its plan, then let the jobs end."""
        jobs = {branch: self.start_killed(branch, kill_plans[branch]) for branch in self.branches}
        kill_after = {branch: self._random_seconds() for branch in jobs}
        while jobs:
            time.sleep(0.01)
            for branch, job in list(jobs.items()):
                kills, result = kill_plans[branch], self.result
                age = time.monotonic() - job.began
                by_time = bool(kills) and kills[0][1] == "any" and age > kill_after[branch]
                if kills and (job.paused_phase or by_time) and job.running:
                    self._kill_and_wait(branch, job, kills.pop(0)[0])
                    jobs[branch] = self.start_killed(branch, kills)
                    kill_after[branch] = self._random_seconds()
                elif not job.running:
                    codes = job.wait(1.0)
                    if not is_finished(self.killed_folder(branch)):
                        result.faults.append(f"{branch} ended by itself ({codes}): see {job.log}")
                    elif kills:
                        result.faults.append(f"{branch} ended with {len(kills)} kills to go")
                    del jobs[branch]
                elif age > self.patience:
                    result.faults.append(f"start {job.folder.name} of {branch} never ended")
                    job.wait(0.0)

    def _kill_and_wait(self, branch: str, job: Job, target: str) -> None:
        result, phase = self.result, job.kill(target)
        result.kills[branch, target, phase] += 1
        self.report(f"kill {sum(result.kills.values())}: {branch}, {target}, in {phase}")
        if job.wait(self.patience) is None:
            fault = f"start {job.folder.name}: hung after a killed {target} in {phase}"
            result.faults.append(fault)

    def _random_seconds(self) -> float:
        return self.rng.uniform(0.0, self.baseline_seconds / 4)

    def compare(self) -> None:
        """Compare the killed run with the baseline, and check its ledger."""
        first, result = self.branches[0], self.result
        for branch in self.branches:
            if not is_finished(self.killed_folder(branch)):
                result.faults.append(f"{branch} never finished")
                return
        self.report("comparing")
        baseline = self.baseline / first if self.concurrent else self.baseline
        result.faults += differences(baseline, self.killed_folder(first))
        if self.concurrent:
            repeated = self.folder / "repeated"
            swaps = swap_replay.overrides(self.killed / "sft")
            job = self.start_job("repeated", repeated, *swaps)
            codes = job.wait(self.patience)
            if codes != [0] * self.world:
                result.faults.append(f"the repeated run failed ({codes}): see {job.log}")
                return
            result.faults += sft_differences(repeated, self.killed / "sft")
        for branch in self.branches:
            ledger = check_ledger(self.killed_folder(branch), self.recipe)
            result.faults += ledger.faults
            result.steps += ledger.steps
            result.samples += ledger.samples
            result.epochs += ledger.epochs


def plan_kills(
    branches: Sequence[str], kill_count: int, rng: random.Random
) -> dict[str, list[Kill]]:
    """Branch → its job's kills: all targets and phases in turn, shuffled."""
    plans: dict[str, list[Kill]] = {}
    for number, branch in enumerate(branches):
        count = kill_count // len(branches) + (number < kill_count % len(branches))
        branch_phases = [p for p in PHASES if p not in ABSENT_PHASES[branch]]
        targets = [TARGETS[i % len(TARGETS)] for i in range(count)]
        phases = [branch_phases[i % len(branch_phases)] for i in range(count)]
        rng.shuffle(targets)
        rng.shuffle(phases)
        # A launcher is killed once its ranks have reported, so that they become orphans.
        plans[branch] = [
            (t, "turn" if t in ("launcher", "command") and p == "any" else p)
            for t, p in zip(targets, phases, strict=True)
        ]
    return plans


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
    disk: str = "",
    kill_plans: dict[str, list[Kill]] | None = None,
    report: Callable[[str], Any] = print,
) -> SoakResult:
    """Train recipe ``name`` twice below ``folder``: never killed, and killed ``kills`` times.

    ``concurrent``: as two jobs; the baseline run is then of the pretrain branch, and the sft branch
    is compared with one job that repeats its swaps. ``patience``: seconds that a job may take to
    its end, and its ranks to die after a kill. ``disk``: the killed run's, `PausePlan.disk`.
    ``kill_plans``: branch → kills, instead of those
    planned by ``kills`` and ``seed``. ``report`` gets a line for each step of the test.
    """
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty: give a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    state = Soak(name, overrides, folder, world, seed, concurrent, patience, disk, report)
    report("the baseline run")
    state.run_baseline()
    state.run_with_kills(kill_plans or plan_kills(state.branches, kills, state.rng))
    state.compare()
    state.result.seconds = time.monotonic() - began
    return state.result
