"""The data of run folders for the report's figures and tables."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import yaml

from dsasr.checkpoint.locate import run_folder
from dsasr.entropy_allocation.allocation_row import AllocationRow, EncoderSource
from dsasr.evaluation.results import Results, read_results
from dsasr.inference.model_from_run import run_recipe
from dsasr.schedule import Schedule
from dsasr.tracking import run_log
from dsasr.tracking.run_log import (
    CLIPS,
    ENVIRONMENT,
    TRANSCRIPTS,
    Row,
    read_events,
    read_metrics,
    without_missing,
)
from dsasr.utils.errors import UserError
from dsasr.utils.io import nonfinite_to_none, read_json_lines
from dsasr.utils.masking import mask

CLIPS_BYTES = 4_000_000  # of a run's sounds on the page, at most
ONLINE = "allocation_"  # of the stage in the metrics lines of the online probe


@dataclass
class RunData:
    """The data of a run folder.

    ``events`` and ``metrics`` are the lines of its logs, ``checkpoints`` the rows of its
    allocation.jsonl, ``publisher_rows`` those of the run whose snapshots it loads, if that is
    another. ``suite`` is report.json, ``transcripts`` are those of the evaluation, and ``clips``
    its sounds of the worst ones by key (FLAC). ``environments`` and ``recipes`` are those of each
    job, the latter as YAML. ``jobs`` are the names of its folders: two of a concurrent
    run, whose ``steps`` and ``seconds`` are each job's own.
    """

    name: str
    events: list[Row] = field(default_factory=list)
    metrics: list[Row] = field(default_factory=list)
    checkpoints: list[AllocationRow] = field(default_factory=list)
    publisher_rows: list[AllocationRow] = field(default_factory=list)
    suite: Row = field(default_factory=dict)
    schedule: Schedule | None = None
    transcripts: Results = field(default_factory=Results)
    clips: dict[str, bytes] = field(default_factory=dict)
    environments: dict[str, Row] = field(default_factory=dict)
    recipes: dict[str, str] = field(default_factory=dict)
    jobs: tuple[str, ...] = ()  # rows of allocation.jsonl may be of other runs too

    @property
    def all_environments(self) -> dict[str, Row]:
        """Where each job was trained, and where the run was evaluated."""
        shown = ("machine", "gpus", "cores", "system", "commit", "versions", "time")
        evaluated = {k: v for k, v in self.suite.get("evaluated", {}).items() if k in shown}
        return {**self.environments, **({"evaluation": evaluated} if evaluated else {})}

    @property
    def seed(self) -> int | None:
        """The recipe's; None where the recipe was not read."""
        for text in self.recipes.values():
            return (yaml.safe_load(text) or {}).get("seed")
        return None

    @property
    def online(self) -> list[AllocationRow]:
        """The rows of the online probe, in the order of the metrics."""
        return [online_row(m) for m in self.metrics if m["stage"].startswith(ONLINE)]

    @property
    def validation(self) -> list[Row]:
        return [m for m in self.metrics if m["stage"].startswith("valid_")]

    @property
    def trained(self) -> list[Row]:
        """The lines of training, not of what was measured beside it."""
        return [m for m in self.metrics if "step" in m]

    @property
    def drift(self) -> list[Row]:
        return [m for m in self.metrics if "cka" in m]

    @property
    def joint_stage(self) -> str | None:
        """The name of the first sft stage that trains the encoder."""
        for stage in self.schedule.stages if self.schedule else ():
            if stage.trains_sft_encoder:
                return stage.name
        return None

    @property
    def train_seconds(self) -> float:
        return max((m["seconds"] for m in self.metrics), default=0.0)


def online_row(line: Row) -> AllocationRow:
    """The row of a metrics line of the online probe."""
    stage = line["stage"].removeprefix(ONLINE)
    source = EncoderSource(
        stage, "live", branch=line["branch"], stage=stage, steps=line["steps"],
        seconds=line.get("seconds"),
    )  # fmt: skip
    row = AllocationRow.from_scalars(source, line)
    count = int(line.get("probe_utterances", 0))
    estimates = {name: getattr(row, name) for name in ("pai", "csai") if getattr(row, name)}
    return replace(row, **{n: replace(e, utterances=count) for n, e in estimates.items()})


def collect(folder: str | Path, name: str = "") -> RunData:
    """A run folder's data: recipe.yaml, events.jsonl, metrics.jsonl and, where they exist,
    report.json and allocation.jsonl. A folder of the two jobs of a concurrent run has the data of
    both.

    Raises `UserError` for a folder that is not a run's, or whose allocation.jsonl is of another
    version.
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
        suite=sft.suite,
        transcripts=sft.transcripts,
        clips=sft.clips,
        environments={**pretrain.environments, **sft.environments},
        recipes={**pretrain.recipes, **sft.recipes},
        schedule=replace(sft.schedule, branch="both"),
        jobs=pretrain.jobs + sft.jobs,
    )


def _job(folder: Path, name: str) -> RunData:
    recipe = run_recipe(folder)
    run = RunData(name, schedule=recipe.schedule(), jobs=(folder.resolve().name,))
    run.events = [without_missing(row) for row in read_events(folder)]
    run.metrics = [without_missing(row) for row in read_metrics(folder)]
    if not run.metrics:
        raise UserError(f"{folder} has no metrics yet: let it train first")
    run.checkpoints = _allocation(folder)
    run.publisher_rows = _publisher_rows(folder, recipe.store_folder)
    [job] = run.jobs
    run.recipes[job] = mask((folder / "recipe.yaml").read_text(encoding="utf-8"))
    with suppress(OSError, ValueError):
        run.environments[job] = json.loads((folder / ENVIRONMENT).read_text(encoding="utf-8"))
    path = folder / "report.json"
    if path.is_file():
        run.suite = nonfinite_to_none(json.loads(path.read_text(encoding="utf-8")))
        run.clips = _clips(folder / CLIPS, run.suite.get("clips") or {})
    if (folder / TRANSCRIPTS).is_file():
        run.transcripts = read_results(folder / TRANSCRIPTS)
    return run


def _clips(folder: Path, names: dict[str, str]) -> dict[str, bytes]:
    """Sounds by key, smallest first until `CLIPS_BYTES`; what is missing is left out."""
    paths = {key: folder / Path(name).name for key, name in names.items()}
    sizes = {key: path.stat().st_size for key, path in paths.items() if path.is_file()}
    clips, total = {}, 0
    for key in sorted(sizes, key=sizes.__getitem__):
        total += sizes[key]
        if total > CLIPS_BYTES:
            break
        clips[key] = paths[key].read_bytes()
    return clips


def _allocation(folder: Path) -> list[AllocationRow]:
    path = folder / "allocation.jsonl"
    try:
        return [AllocationRow.from_json(row) for row in read_json_lines(path)]
    except (ValueError, TypeError) as error:
        raise UserError(
            f"{path}: {error}: it is of another version, remove it and measure again"
        ) from None


def _publisher_rows(folder: Path, store: Path) -> list[AllocationRow]:
    """The allocation rows of the run that publishes into ``store``, if it is not ``folder``."""
    try:
        publisher = run_folder(store)
    except UserError:  # not in a run folder, or deleted
        return []
    if publisher.resolve() == folder.resolve():
        return []
    return _allocation(publisher)


def named(folders: Sequence[str | Path]) -> list[RunData]:
    """`collect` of each folder, under distinct names."""
    paths = [Path(f).resolve() for f in folders]
    names = [p.name for p in paths]
    if len(set(names)) < len(names):
        names = [f"{p.parent.name}/{p.name}" for p in paths]
    return [collect(p, n) for p, n in zip(paths, names, strict=True)]


def before_and_after(run: RunData) -> tuple[AllocationRow, AllocationRow] | None:
    """The encoder's row before and after joint training.

    From allocation.jsonl where both are there with the same settings, else from the online probe.
    """
    in_run = [r for r in run.checkpoints if not run.jobs or _folder_name(r) in run.jobs]
    after = [r for r in in_run if run.joint_stage and r.encoder.stage == run.joint_stage]
    if after and after[-1].encoder.snapshot:
        name = f"/{after[-1].encoder.snapshot}"
        before = [
            r for r in (*in_run, *run.publisher_rows)
            if r.encoder.kind == "snapshot" and r.encoder.name.endswith(name)
            and r.settings == after[-1].settings
        ]  # fmt: skip
        if before:
            return before[-1], after[-1]
    probed = [r for r in run.online if r.encoder.branch == "sft" and r.pai]
    late = [r for r in probed if r.encoder.stage == run.joint_stage]
    early = [r for r in probed if late and r.encoder.steps < late[0].encoder.steps]
    return (early[-1], late[-1]) if early and late else None


def _folder_name(row: AllocationRow) -> str:
    return Path(row.encoder.run).resolve().name if row.encoder.run else ""


def allocation_rows(run: RunData, prefix: bool = False) -> list[AllocationRow]:
    """The rows of allocation.jsonl, else the online probe's last ones of each stage.

    Their names have the run's as a prefix if ``prefix``.
    """
    rows = sorted(run.checkpoints, key=lambda row: row.encoder.kind == "random")
    if rows:
        if prefix:
            return rows
        return [_renamed(row, row.encoder.name.removeprefix(f"{run.name}/")) for row in rows]
    last = {row.encoder.stage: row for row in run.online if row.pai}
    return [
        _renamed(row, f"{run.name}: {stage}" if prefix else f"end of {stage}")
        for stage, row in last.items()
    ]


def _renamed(row: AllocationRow, name: str) -> AllocationRow:
    return replace(row, encoder=replace(row.encoder, name=name))


def audio_hours(run: RunData) -> float:
    """Hours of (augmented) audio over all steps, from the rate and the time of each line."""
    return run_log.audio_hours(run.metrics)
