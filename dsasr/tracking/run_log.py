"""The JSON-lines logs of a run folder: their names, their one reader, and their cut at a resume.

``events.jsonl`` has a row for everything that happens once: {"event": kind, "seconds": wall-clock
of the run, "steps": optimizer steps of both branches, …}. ``metrics.jsonl`` has a row for each log
interval: {"steps", "branch", "stage", "seconds", value by name}. ``ledger.jsonl`` (with
monitor.ledger) has a row for each step: {"steps", "branch", "stage", "step", "samples"}. A value
that was not finite is null.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dsasr.utils.errors import UserError
from dsasr.utils.io import atomic_write, nonfinite_to_none, read_lines

Row = dict[str, Any]
METRICS, EVENTS, LEDGER = "metrics.jsonl", "events.jsonl", "ledger.jsonl"
# What `dsasr evaluate --report` writes beside report.json.
TRANSCRIPTS, CLIPS = "transcripts.jsonl", "worst_clips"
ENVIRONMENT = "environment.json"  # machine, versions and commit of the newest start
SPEECH = "speech.json"  # what the training's utterances are like (`dsasr.data.speech_statistics`)
HYPOTHESES = "hypotheses.jsonl"  # some transcripts of the newest evaluation, not a log
# Events of the job, not of the training: a resumed run does not repeat them.
JOB_EVENTS = (
    "checkpoint", "checkpoint_failed", "checkpoint_passed_over", "evaluation_repeated", "resumed",
    "stopped",
)  # fmt: skip


def read_events(folder: Path, *, strict: bool = False) -> list[Row]:
    """The events of the run in ``folder``, oldest first.

    A line that is no JSON, such as the torn last one of a killed run, is skipped, and a missing
    file has no rows. ``strict``: raises `UserError` for a missing file and for a broken line that
    is not the last.
    """
    path = folder / EVENTS
    if not strict:
        return _read(path)
    try:
        count = len(read_lines(path))
    except OSError as error:
        raise UserError(f"{folder} is no run folder: {error.strerror}") from None
    rows = list(_parsed_lines(path))
    broken = set(range(count - 1)) - {number for number, _, _ in rows}
    if broken:
        raise UserError(f"{path} line {min(broken) + 1} is not JSON")
    return [row for _, _, row in rows]


def read_metrics(folder: Path) -> list[Row]:
    """The metrics of the run in ``folder``, oldest first; broken lines are skipped."""
    return _read(folder / METRICS)


def read_ledger(folder: Path) -> list[Row]:
    """The samples of each step of the run in ``folder``; broken lines are skipped."""
    return _read(folder / LEDGER)


def is_finished(folder: Path) -> bool:
    """Whether the run in ``folder`` has reached the end of its schedule."""
    return any(row["event"] == "finished" for row in read_events(folder))


def audio_hours(metrics: Sequence[Row]) -> float:
    """Hours of (augmented) audio over all steps, from the rate and the time of each line."""
    total, last = 0.0, {}
    for line in metrics:
        if "audio_hours_per_hour" in line:
            steps = line["step"] - last.get(line["stage"], 0)  # since the stage's line before
            total += line["audio_hours_per_hour"] * line["step_seconds"] * steps
        if "step" in line:
            last[line["stage"]] = line["step"]
    return total / 3600


def without_missing(row: Any) -> Any:
    """``row`` without the keys, at any depth, whose value is null or not finite."""
    if not isinstance(row, dict):
        return row
    return {k: without_missing(v) for k, v in nonfinite_to_none(row).items() if v is not None}


def truncate_log(path: Path, steps: int, line_count: int | None) -> int:
    """Cut a log back to a checkpoint after ``steps`` optimizer steps; returns the lines left.

    Removed are the rows of later steps, broken lines, and what follows the first ``line_count``
    lines (None: no such limit), except `JOB_EVENTS`: a resumed run writes the rest again. No steps
    and no ``line_count`` means no checkpoint: all rows are removed.
    """
    if not path.is_file():
        return 0
    lines = [
        line + "\n"
        for number, line, row in _parsed_lines(path)
        if (steps or line_count is not None)
        and row.get("steps", 0) <= steps
        and (line_count is None or number < line_count or row.get("event") in JOB_EVENTS)
    ]
    atomic_write(path, "".join(lines))
    return len(lines)


def _read(path: Path) -> list[Row]:
    return [row for _, _, row in _parsed_lines(path)] if path.is_file() else []


def _parsed_lines(path: Path) -> Iterator[tuple[int, str, Row]]:
    """(line number from 0, text, row) of each line that holds a JSON object."""
    for number, line in enumerate(read_lines(path)):
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            yield number, line, row
