"""The runs below a folder, as a table (``dsasr ls``)."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.table import Table
from rich.text import Text

from dsasr.reporting.run_state import RECIPE, Job, job_folders, series
from dsasr.reporting.terminal_view import COLORS
from dsasr.tracking import console as lines
from dsasr.tracking.run_log import audio_hours
from dsasr.utils.errors import first_line
from dsasr.utils.terminal import one_line

MOST_FOLDERS = 20_000  # looked into
RATES = ("wer", "mer", "cer", "phoneme_error_rate")  # the first that was measured is shown


@dataclass
class Found:
    """The jobs below a folder, and a line for each folder that could not be read."""

    jobs: list[Job] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def find(top: Path) -> Found:
    """The jobs of all runs at and below ``top``, by name; links to folders are not followed."""
    found = Found()
    for run in _runs(top, found.problems):
        for folder in job_folders(run):
            try:
                job = Job(folder, run)
            except Exception as error:  # one bad folder must not hide the others
                found.problems.append(f"{folder}: {first_line(error)}")
                continue
            found.jobs.append(job)
            found.problems += job.problems
    return found


def _runs(top: Path, problems: list[str]) -> Iterator[Path]:
    """Run folders; what is inside one (its code, its checkpoints) is not looked into."""
    seen = 0

    def failed(error: OSError) -> None:
        problems.append(f"{error.filename}: {error.strerror}")

    for name, folders, _ in os.walk(top, onerror=failed):
        folder = Path(name)
        seen += 1
        if seen > MOST_FOLDERS:
            problems.append(f"{top} has over {MOST_FOLDERS:,} folders: the rest was not looked at")
            return
        try:
            is_run = bool(job_folders(folder))
        except OSError as error:  # no right to look inside
            problems.append(f"{folder}: {error.strerror}")
            folders.clear()
            continue
        if is_run:
            yield folder
            folders.clear()
        elif (folder / RECIPE).is_file():
            problems.append(f"{folder}: a {RECIPE}, but no log: it has not trained yet")
            folders.clear()
        else:
            folders[:] = sorted(f for f in folders if not f.startswith("."))


def table(jobs: Sequence[Job], top: Path) -> Table:
    """Name, state, stage and step, error rate in validation, hours, last change; a line a job."""
    shown = Table(box=None, pad_edge=False, header_style="bold")
    shown.add_column("run", no_wrap=True, overflow="fold")
    shown.add_column("state", no_wrap=True)
    shown.add_column("stage", no_wrap=True)
    for name in ("step", "validation", "trained", "hours of audio", "changed"):
        shown.add_column(name, justify="right", no_wrap=True)
    for job in jobs:
        done, total = job.steps
        age = job.changed()
        shown.add_row(
            one_line(_name(job, top)),
            Text(job.state.name, COLORS.get(job.state.name, "")),
            one_line(_stage(job)),
            f"{done:,}/{total:,}" if total else "–",
            _rate(job),
            lines.clock(job.seconds),
            _audio_hours(job),
            f"{ago(age)} ago" if age is not None else "–",
        )
    return shown


def _name(job: Job, top: Path) -> str:
    path = job.folder.resolve()
    top = top.resolve()
    return str(path.relative_to(top)) if path.is_relative_to(top) and path != top else path.name


def _stage(job: Job) -> str:
    """The stages that run, or the last one."""
    current = job.current
    if not current:
        current = [s for s in job.stages if s.done][-1:]
    return ", ".join(stage.name for stage in current) or "–"


def _rate(job: Job) -> str:
    """The newest error rate, of the first kind in `RATES`."""
    for key in RATES:
        if values := series([e for e in job.events.rows if e.get("event") == "evaluated"], key):
            return f"{lines.ERROR_RATES[key]} {lines.percent(values[-1])}"
    return "–"


def _audio_hours(job: Job) -> str:
    keys = ("audio_hours_per_hour", "step_seconds", "step")
    whole = [m for m in job.trained if len(series([m], keys[0])) and len(series([m], keys[1]))]
    hours = audio_hours(whole)
    return f"{hours:,.0f}" if hours >= 100 else f"{hours:.3g}"


def ago(seconds: float) -> str:
    """A time that has passed, in its largest unit: ``45 s``, ``12 min``, ``3 h``, ``5 days``."""
    for unit, size, most in (("s", 1, 120), ("min", 60, 120), ("h", 3600, 48)):
        if seconds < most * size:
            return f"{int(seconds // size)} {unit}"
    return f"{int(seconds // 86_400)} days"
