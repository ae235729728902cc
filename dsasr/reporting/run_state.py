"""The state of a run by the files in its folder: whether it trains, where it is, how long it takes.

Only files are read, none is locked or written, and the job is not contacted, so a run may be
another machine's. recipe.yaml is read as plain YAML: one of another version, or with files that
are not here, does no harm. No torch is imported.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dsasr.config import read_yaml
from dsasr.launch import run_lock, slurm
from dsasr.tracking.growing_log import GrowingLog
from dsasr.tracking.run_log import EVENTS, METRICS, Row
from dsasr.utils.errors import UserError, message_of
from dsasr.utils.io import read_json_lines

RECIPE = "recipe.yaml"
BRANCHES = ("pretrain", "sft")
RATE_LINES = 20  # newest lines of metrics that the time left is estimated from
LARGEST = 1e15  # a greater number is no step, time or size of a run
ENDS = ("finished", "stopped")  # events of a job's end


@dataclass(frozen=True)
class State:
    """``name``: running, stopping, finished, stopped, failed, or waiting (for Slurm)."""

    name: str
    detail: str = ""  # where it runs, or why it ended


@dataclass(frozen=True)
class Stage:
    """A stage of the job's schedule, and its steps done."""

    name: str
    branch: str
    steps: int
    done: int = 0

    @property
    def share(self) -> float:
        return min(self.done / self.steps, 1.0)


def is_job(folder: Path) -> bool:
    """Whether a job has trained in ``folder``, or does."""
    names = (METRICS, EVENTS, run_lock.LOCK)
    return (folder / RECIPE).is_file() and any((folder / name).is_file() for name in names)


def job_folders(run: Path) -> list[Path]:
    """The folders of a run's jobs: its own, or the two of a concurrent run; empty: no run."""
    return [f for f in (run, *(run / branch for branch in BRANCHES)) if is_job(f)]


@dataclass
class Job:
    """One job of a run, followed by `refresh`."""

    folder: Path
    run: Path  # the folder that the job was submitted for: ``folder`` or the one above it
    recipe: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    gone: bool = False  # the folder could not be found at the last `refresh`

    def __post_init__(self) -> None:
        self.metrics = GrowingLog(self.folder / METRICS)
        self.events = GrowingLog(self.folder / EVENTS)
        self._recipe_time = 0.0
        self._beat: tuple[str, float] = ("", 0.0)  # the last one seen, and when it was new
        self.state = State("failed")
        self.refresh()

    @property
    def name(self) -> str:
        """``run``, or ``run/pretrain`` of a concurrent run."""
        run = self.run.resolve().name
        return run if self.folder == self.run else f"{run}/{self.folder.name}"

    def refresh(self) -> None:
        """Read what the job has written since."""
        self.problems = []
        self.gone = not os.path.isdir(self.folder)
        if self.gone:
            self.problems = [f"{self.folder} is gone: removed, or its file system is away"]
            return
        self._read_recipe()
        for log in (self.metrics, self.events):
            log.refresh()
            if log.problem and os.path.exists(log.path):
                self.problems.append(log.problem)
            if log.broken:
                self.problems.append(f"{log.path}: {log.broken} broken lines skipped")
        try:
            self.state = self._state()
        except (OSError, ValueError, TypeError) as error:  # no right to read the lock, or it is odd
            self.problems.append(f"{self.folder / run_lock.LOCK}: {error}")

    def _read_recipe(self) -> None:
        path = self.folder / RECIPE
        try:
            changed = path.stat().st_mtime
            if changed == self._recipe_time:
                return
            values = read_yaml(path)
            self.recipe = values if isinstance(values, dict) else {}
            self._recipe_time = changed
        except (OSError, UserError, ValueError, RecursionError) as error:
            self.problems.append(f"{path}: {message_of(error)}")

    # -- where it is -------------------------------------------------------------------------

    @property
    def trained(self) -> list[Row]:
        """The lines of training, not of what was measured beside it."""
        return [m for m in self.metrics.rows if number(m, "step") is not None]

    @property
    def stages(self) -> list[Stage]:
        """The stages that this job trains."""
        own = self.recipe.get("branch", "both")
        done: dict[str, int] = {}
        for row in self.trained:
            done[str(row.get("stage"))] = int(row["step"])
        ended = {str(e.get("name")) for e in self.events.rows if e.get("event") == "stage_end"}
        stages = []
        for values in _mappings(self.recipe.get("stages")):
            name, branch = str(values.get("name")), str(values.get("branch"))
            steps = number(values, "steps")
            if own in ("both", branch) and steps and steps >= 1:
                count = int(steps) if name in ended else min(done.get(name, 0), int(steps))
                stages.append(Stage(name, branch, int(steps), count))
        return stages

    @property
    def current(self) -> list[Stage]:
        """The stages that began and have not ended: two while both branches take turns."""
        begun = {str(e.get("name")) for e in self.events.rows if e.get("event") == "stage"}
        return [s for s in self.stages if s.name in begun and s.done < s.steps]

    @property
    def steps(self) -> tuple[int, int]:
        """(optimizer steps done, those of the whole job)."""
        return sum(s.done for s in self.stages), sum(s.steps for s in self.stages)

    @property
    def seconds(self) -> float:
        """Of the run, without the time between two jobs."""
        rows = (*self.metrics.rows[-1:], *self.events.rows[-1:])
        return max((number(row, "seconds") or 0.0 for row in rows), default=0.0)

    @property
    def seconds_left(self) -> float | None:
        """Of all steps that are left, at the speed of the newest ones; None: not known yet."""
        rows = self.trained[-RATE_LINES:]
        done, total = self.steps
        if done >= total:
            return 0.0
        rate = _rate(rows, "steps")
        return None if rate is None else rate * (total - done)

    def stage_seconds_left(self, stage: Stage) -> float | None:
        """Of a stage's steps that are left, with what comes between them; None: not known yet."""
        rows = [m for m in self.trained[-4 * RATE_LINES :] if m.get("stage") == stage.name]
        rate = _rate(rows[-RATE_LINES:], "step")
        return None if rate is None else rate * (stage.steps - stage.done)

    def last_event(self, *kinds: str) -> Row | None:
        """The newest event of one of ``kinds``."""
        return next((e for e in reversed(self.events.rows) if e.get("event") in kinds), None)

    def changed(self) -> float | None:
        """Seconds since the job last wrote a log, by the file system's dates; None: never."""
        return _age([self.folder / METRICS, self.folder / EVENTS])

    # -- whether it trains -------------------------------------------------------------------

    def _state(self) -> State:
        owner = run_lock.Owner.read(self.folder)
        if owner is not None and owner.token:
            return self._locked(owner)
        end = self.last_event(*ENDS, "stage", "resumed")
        kind = end["event"] if end else ""
        if kind == "finished":
            return State("finished")
        job = slurm.job_of(self.run)
        if job:
            return State("waiting", f"for Slurm job {job}")
        if kind == "stopped":
            return State("stopped", f"by {end.get('cause', 'a signal')}")
        return State("failed", "ended before its schedule did")

    def _locked(self, owner: run_lock.Owner) -> State:
        """Of a job whose lock is there: a sign of life decides."""
        where = f"on {owner.host}, process {owner.pid}"
        if owner.job:
            where += f", Slurm job {owner.job}"
        path = run_lock.beat_path(self.folder, owner)
        beat = ""
        with contextlib.suppress(OSError, ValueError):
            beat = path.read_text(encoding="utf-8")[:100]
        now = time.monotonic()
        if beat != self._beat[0] or not self._beat[1]:
            first = not self._beat[1]
            # Until a beat is seen to change, its file's date is all there is.
            age = (_age([path]) or 0.0) if first else 0.0
            self._beat = (beat, now - age)
        silent = now - self._beat[1]
        if owner.lives is False:
            return State("failed", f"killed {where}")
        if owner.lives is None and silent > run_lock.STALE:
            return State("failed", f"silent for {math.ceil(silent / 60)} min, {where}")
        return State("stopping" if beat.startswith("stopping") else "running", where)


# -- values of others ----------------------------------------------------------------------------


def number(row: Mapping[str, Any], key: str) -> float | None:
    """A finite number of a row; None where there is none."""
    value = row.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return value if -LARGEST < value < LARGEST else None  # false of NaN


def series(rows: Sequence[Row], key: str) -> list[float]:
    """The finite values of ``key``, oldest first."""
    return [value for row in rows if (value := number(row, key)) is not None]


def hypotheses(folder: Path, name: str) -> list[Row]:
    """The rows of a small file of JSON lines; none where it is missing or unreadable."""
    try:
        return [row for row in read_json_lines(folder / name) if isinstance(row, dict)]
    except (OSError, ValueError):
        return []


def _mappings(values: Any) -> Iterator[dict[str, Any]]:
    yield from (v for v in (values if isinstance(values, list) else ()) if isinstance(v, dict))


def _rate(rows: Sequence[Row], key: str) -> float | None:
    """Seconds of a step between the first and the last of ``rows``."""
    known = [r for r in rows if number(r, "seconds") is not None and number(r, key) is not None]
    if len(known) < 2:  # one line: the mean of its interval
        return number(known[0], "step_seconds") if known else None
    first, last = known[0], known[-1]
    steps = last[key] - first[key]
    return (last["seconds"] - first["seconds"]) / steps if steps > 0 else None


def _age(paths: Sequence[Path]) -> float | None:
    """Seconds since the newest change of ``paths``; of a file server whose clock is ahead: 0."""
    times = []
    for path in paths:
        with contextlib.suppress(OSError, ValueError):
            times.append(path.stat().st_mtime)
    return max(time.time() - max(times), 0.0) if times else None
