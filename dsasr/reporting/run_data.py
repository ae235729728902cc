"""What a run folder tells, as plain rows, for pictures and for the report's tables."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dsasr.inference.model_from_run import run_folder, run_recipe
from dsasr.stages import Schedule
from dsasr.utils.errors import UserError
from dsasr.utils.io import nonfinite_to_none, read_json_lines

Row = dict[str, Any]
LIMITED = ("found", "limit")  # of an estimate: is there any, and what would have stood out


@dataclass
class RunData:
    """What a run folder tells. ``looks`` are metrics lines of `watch`, ``valid`` of validation;
    ``checkpoints`` are rows of tools/allocation.py, ``taken`` those of the job whose snapshots it
    takes, if another; ``trial`` is report.json. ``jobs`` are the names of its folders: two of a
    concurrent run, whose ``steps`` and ``seconds`` are each job's own."""

    name: str
    events: list[Row] = field(default_factory=list)
    metrics: list[Row] = field(default_factory=list)
    checkpoints: list[Row] = field(default_factory=list)
    taken: list[Row] = field(default_factory=list)
    trial: Row = field(default_factory=dict)
    schedule: Schedule | None = None
    jobs: tuple[str, ...] = ()  # rows of tools/allocation.py may be of other runs too

    @property
    def looks(self) -> list[Row]:
        return [m for m in self.metrics if m["stage"].startswith("allocation_")]

    @property
    def valid(self) -> list[Row]:
        return [m for m in self.metrics if m["stage"].startswith("valid_")]

    @property
    def drift(self) -> list[Row]:
        return [m for m in self.metrics if "cka" in m]

    @property
    def joint(self) -> str | None:
        """The first sft stage that trains the encoder."""
        for stage in self.schedule.stages if self.schedule else ():
            if stage.branch == "sft" and "encoder" in stage.trains:
                return stage.name
        return None

    @property
    def longest(self) -> float:
        return max((m["seconds"] for m in self.metrics), default=0.0)


def collect(folder: str | Path, name: str = "") -> RunData:
    """A run folder's data: recipe.yaml, events.jsonl, metrics.jsonl; where they are, report.json of
    tools/evaluate.py and allocation.jsonl of tools/allocation.py. A folder of the two jobs of a
    concurrent run has the data of both.

    Raises `UserError` for a folder that is no run's.
    """
    folder = Path(folder)
    name = name or folder.resolve().name
    jobs = [folder / branch for branch in ("pretrain", "sft")]
    if (folder / "recipe.yaml").is_file() or not all((j / "recipe.yaml").is_file() for j in jobs):
        return _job(folder, name)
    pretrain, sft = (_job(job, name) for job in jobs)
    return RunData(
        name,
        pretrain.events + sft.events,
        pretrain.metrics + sft.metrics,
        pretrain.checkpoints + sft.checkpoints,
        trial=sft.trial,
        schedule=replace(sft.schedule, branch="both"),
        jobs=pretrain.jobs + sft.jobs,
    )


def _job(folder: Path, name: str) -> RunData:
    recipe = run_recipe(folder)
    run = RunData(name, schedule=recipe.schedule(), jobs=(folder.resolve().name,))
    run.events, run.metrics = (_measured(folder / f"{n}.jsonl") for n in ("events", "metrics"))
    if not run.metrics:
        raise UserError(f"{folder} has no metrics yet: let it train first")
    run.checkpoints = _measured(folder / "allocation.jsonl")
    run.taken = _taken(folder, recipe.store_folder)
    path = folder / "report.json"
    if path.is_file():
        run.trial = nonfinite_to_none(json.loads(path.read_text(encoding="utf-8")))
    return run


def _taken(folder: Path, store: Path) -> list[Row]:
    """The allocation rows of the run that publishes into ``store``, if it is not ``folder``."""
    try:
        publisher = run_folder(store)
    except UserError:  # encoders from elsewhere, or the store is gone
        return []
    if publisher.resolve() == folder.resolve():
        return []
    return _measured(publisher / "allocation.jsonl")


def _measured(path: Path) -> list[Row]:
    """A file's rows without what is null or no finite number in them: that was not measured."""

    def held(row: Any) -> Any:
        if not isinstance(row, dict):
            return row
        return {key: held(value) for key, value in row.items() if value is not None}

    return [held(nonfinite_to_none(row)) for row in read_json_lines(path)]


def named(folders: Sequence[str | Path]) -> list[RunData]:
    """`collect` of each, with names that tell them apart."""
    paths = [Path(f).resolve() for f in folders]
    names = [p.name for p in paths]
    if len(set(names)) < len(names):
        names = [f"{p.parent.name}/{p.name}" for p in paths]
    return [collect(p, n) for p, n in zip(paths, names, strict=True)]


def before_and_after(run: RunData) -> tuple[Row, Row] | None:
    """The encoder's row before and after joint training: of tools/allocation.py, measured alike,
    else of looks."""
    own = [r for r in run.checkpoints if not run.jobs or _folder_name(r) in run.jobs]
    after = [r for r in own if r.get("stage") == run.joint and run.joint]
    if after and after[-1].get("encoder"):
        before = [
            r for r in (*own, *run.taken)
            if r["kind"] == "snapshot" and r["name"].endswith(f"/{after[-1]['encoder']}")
            and r.get("measured") == after[-1].get("measured")
        ]  # fmt: skip
        if before:
            return _flat(before[-1]), _flat(after[-1])
    looks = [m for m in run.looks if m["branch"] == "sft" and "pai" in m]
    late = [m for m in looks if m["stage"] == f"allocation_{run.joint}"]
    early = [m for m in looks if late and m["steps"] < late[0]["steps"]]
    return (early[-1], late[-1]) if early and late else None


def _folder_name(row: Row) -> str:
    return Path(row["run"]).resolve().name if "run" in row else ""


def _flat(row: Row) -> Row:
    """A row of tools/allocation.py with a look's names, as far as they were measured.

    Where ``found`` is False, no gain was found, and one of ``limit`` nats would have stood out.
    """
    out = {key: row[key] for key in ("nse", "name") if key in row}
    for key in ("pai", "csai"):
        names = {"value": key} | {k: f"{key}_{k}" for k in ("low", "high", "share", *LIMITED)}
        out |= {names[k]: value for k, value in row.get(key, {}).items() if k in names}
    return out


def allocation_rows(run: RunData, prefix: bool = False) -> list[Row]:
    """A bar per checkpoint of tools/allocation.py, else per look at a stage's end."""
    rows = []
    for row in sorted(run.checkpoints, key=lambda row: row["kind"] == "random"):
        llm = row.get("llm", {})
        bar = _flat(row) | {"nll_without_audio": llm.get("without_audio")}
        rows.append(bar | {"nll_with_audio": llm.get("with_audio")})
        if not prefix:  # a run's own checkpoints need not say whose they are
            rows[-1]["name"] = row["name"].removeprefix(f"{run.name}/")
    if not rows:
        last = {m["stage"]: m for m in run.looks if "pai" in m}
        for stage, look in last.items():
            name = stage.removeprefix("allocation_")
            rows.append({**look, "name": f"{run.name}: {name}" if prefix else f"end of {name}"})
    return rows


def audio_hours(run: RunData) -> float:
    """Hours of (augmented) audio over all steps, from the rate and the time of each line."""
    total, last = 0.0, {}
    for line in run.metrics:
        if "audio_hours_per_hour" in line:
            steps = line["step"] - last.get(line["stage"], 0)  # since the stage's line before
            total += line["audio_hours_per_hour"] * line["step_seconds"] * steps
        if "step" in line:
            last[line["stage"]] = line["step"]
    return total / 3600
