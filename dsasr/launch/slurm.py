"""Build the sbatch command that trains or evaluates a recipe."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from dsasr.utils import ranges
from dsasr.utils.errors import UserError
from dsasr.utils.io import atomic_write
from dsasr.utils.package_data import CODE, packaged_folder
from dsasr.utils.ranges import Range

SCRIPTS = packaged_folder("slurm")
# Files of slurm/job.sh in a run folder: the id of the job that it belongs to, and of one to stop.
JOB_LOCK, JOB_STOP = "job.lock", "job.stop"
_TIME = re.compile(r"(\d+-\d{1,2}(:\d\d){0,2}|\d+(:\d\d){0,2})")
_TEST_SET = re.compile(r"(?!\.)[A-Za-z0-9._-]+=\S+")


@dataclass(frozen=True)
class SizeConfig:
    nodes: Annotated[int, Range(1, 100_000)] = 1  # number of nodes; at least 1
    gpus: Annotated[int, Range(0, 1024)] = 8  # GPUs of a node, one rank each; 0: a CPU job
    ranks: Annotated[int, Range(0, 1024)] = 0  # ranks of a node without GPUs
    cpus: Annotated[int, Range(1, 1024)] = 8  # CPU cores of a rank, shared with its data workers

    def __post_init__(self) -> None:
        ranges.check(self)
        if self.gpus and self.ranks not in (0, self.gpus):
            raise UserError("slurm: ranks is for nodes without GPUs; with GPUs there is one each")

    @property
    def ranks_per_node(self) -> int:
        return self.gpus or self.ranks or 1

    @property
    def world_size(self) -> int:
        return self.nodes * self.ranks_per_node


@dataclass(frozen=True)
class SlurmConfig:
    """A job's limits. ``size``: the job, or its pretrain component; ``sft``: the sft component."""

    # size of the job; of an async job, of its pretrain component
    size: SizeConfig = field(default_factory=SizeConfig)
    # size of an async job's sft component
    sft: SizeConfig = field(default_factory=SizeConfig)
    # time limit as Slurm reads it: 24:00:00 (hours:minutes:seconds), 30:00 (minutes:seconds) or
    # 2-00:00:00 (days-hours:minutes:seconds); longer than `signal`
    time: str = "24:00:00"
    eval_time: str = "4:00:00"  # time limit of a test set's task in `dsasr submit eval`
    # seconds before the time limit at which the run saves and requeues itself
    signal: Annotated[int, Range(1, 65_535)] = 300
    partition: str = ""  # Slurm partition; empty: the cluster's default
    account: str = ""  # Slurm account; empty: the user's default
    container: str = ""  # image: FILE.sif for Apptainer, else srun's --container-image; empty: none
    # folders that the container sees; empty: the working folder and the run folder
    mounts: str = ""
    network: str = ""  # network interface of NCCL and Gloo, such as ib0; empty: their choice
    # `dsasr doctor` at each start of a training job: off: none; warn: report what falls short;
    # stop: end the job where something does, before it trains
    doctor: Literal["off", "warn", "stop"] = "warn"
    options: tuple[str, ...] = ()  # further options of sbatch, such as --qos=high

    def __post_init__(self) -> None:
        ranges.check(self)
        for key in ("time", "eval_time"):
            value = getattr(self, key)
            if not _TIME.fullmatch(value) or seconds(value) == 0:
                raise UserError(
                    f"slurm.{key}={value}: give hours:minutes:seconds, such as 24:00:00"
                )
        if seconds(self.time) <= self.signal:
            raise UserError(
                f"slurm.time={self.time} is no longer than slurm.signal={self.signal} s, in which "
                "the job saves and requeues itself: give a longer time or a smaller signal"
            )
        for option in self.options:
            if not option.startswith("--"):
                raise UserError(f"slurm.options: {option!r} does not begin with --")


def seconds(time: str) -> int:
    """The seconds of a time limit as Slurm reads it: minutes[:seconds], hours:minutes:seconds or
    days-hours[:minutes[:seconds]]."""
    days, dash, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if dash:
        hours, minutes, rest_seconds = parts + [0] * (3 - len(parts))
    elif len(parts) == 3:
        hours, minutes, rest_seconds = parts
    else:
        hours, (minutes, rest_seconds) = 0, parts + [0] * (2 - len(parts))
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + rest_seconds


@dataclass(frozen=True)
class Submission:
    """An sbatch command, and the environment variables that its script reads."""

    command: tuple[str, ...]
    variables: dict[str, str]
    plan: tuple[tuple[str, str], ...]  # (name, value) rows to print


def train(config: SlurmConfig, run: Path, python: str) -> Submission:
    """One colocated job, in which both branches take turns."""
    job = _training_job(config, run)
    command = [*job, *_size(config.size), str(SCRIPTS / "train.sbatch")]
    plan = [("job", "both branches take turns"), ("size", _describe(config.size)), _time(config)]
    return _submission(config, run, python, command, plan, {"DOCTOR": config.doctor})


def concurrent(config: SlurmConfig, run: Path, python: str) -> Submission:
    """One heterogeneous job with a component for each branch."""
    script = str(SCRIPTS / "async.sbatch")
    job = _training_job(config, run)
    # Each component of a heterogeneous job has its own limits, partition and account.
    repeated = ("--time=", "--partition=", "--account=", "--signal=")
    component = [o for o in job if o.startswith(repeated) or o in config.options]
    command = [*job, *_size(config.size), ":", *component, *_size(config.sft), script]
    plan = [("job", "two components that share snapshots"), ("pretrain", _describe(config.size)),
            ("sft", _describe(config.sft)), _time(config)]  # fmt: skip
    return _submission(config, run, python, command, plan, {"DOCTOR": config.doctor})


def evaluate(config: SlurmConfig, run: Path, python: str, sets: Sequence[str]) -> Submission:
    """A job array with a task for each ``NAME=SHARDS`` of ``sets``. Raises `UserError`."""
    for test_set in sets:
        if not _TEST_SET.fullmatch(test_set):
            raise UserError(f"'{test_set}' is not NAME=SHARDS (letters, digits, ._-; no blank)")
    names = [s.partition("=")[0] for s in sets]
    if len(set(names)) < len(names):
        raise UserError("two test sets have the same name")
    gpu = "1" if config.size.gpus else "0"
    command = [
        *_job(config, run, "dsasr-eval", "%x-%A-%a.log", config.eval_time, 0),
        f"--array=0-{len(sets) - 1}",
        f"--gpus-per-node={gpu}",
        f"--cpus-per-task={config.size.cpus}",
        str(SCRIPTS / "eval.sbatch"),
    ]
    plan = [("job", f"an array of {len(sets)}: {', '.join(names)}"), ("time", config.eval_time)]
    return _submission(config, run, python, command, plan, {"DATA": " ".join(sets)})


def _submission(
    config: SlurmConfig,
    run: Path,
    python: str,
    command: Sequence[str],
    plan: Sequence[tuple[str, str]],
    variables: Mapping[str, str] | None = None,
) -> Submission:
    if set(str(run)) & set("%\\"):
        raise UserError(
            f"run={run}: Slurm replaces % and \\ in the names of its logs: give another folder"
        )
    values = {"CODE": str(CODE), "RUN": str(run), "PYTHON": python}
    values |= {"CONTAINER": config.container, "MOUNTS": config.mounts}
    values |= {"NETWORK": config.network, **(variables or {})}
    queue = f"partition {config.partition or 'default'}, account {config.account or 'default'}"
    plan = [*plan, ("queue", queue), ("run folder", str(run)), ("container", config.container)]
    return Submission(
        tuple(command),
        {k: v for k, v in values.items() if v},
        tuple(row for row in plan if row[1]),
    )


def _job(config: SlurmConfig, run: Path, name: str, log: str, time: str, signal: int) -> list[str]:
    options = ["sbatch", f"--job-name={name}", f"--time={time}"]
    # To the batch script, which records it and passes it on until all ranks have saved.
    options += [f"--signal=B:USR1@{signal}"] if signal else []
    options += [f"--output={run}/logs/{log}"]
    options += [f"--partition={config.partition}"] if config.partition else []
    options += [f"--account={config.account}"] if config.account else []
    return [*options, *config.options]


def _training_job(config: SlurmConfig, run: Path) -> list[str]:
    return _job(config, run, "dsasr", "%x-%j.log", config.time, config.signal)


def _time(config: SlurmConfig) -> tuple[str, str]:
    return "time", f"{config.time}, saves {config.signal} s before"


def _size(size: SizeConfig) -> list[str]:
    return [
        f"--nodes={size.nodes}",
        f"--ntasks-per-node={size.ranks_per_node}",
        f"--gpus-per-node={size.gpus}",
        f"--cpus-per-task={size.cpus}",
    ]


def _describe(size: SizeConfig) -> str:
    kind = "GPU" if size.gpus else "CPU rank"
    ranks = f"{size.nodes} × {size.ranks_per_node} {kind}s"
    return f"{ranks}, {size.cpus} CPUs each: {size.world_size} ranks"


def job_of(run: Path) -> str:
    """The id of the Slurm job that owns a run folder (slurm/job.sh); empty: none."""
    try:
        return (run / JOB_LOCK).read_text(encoding="utf-8").split()[0]
    except (OSError, IndexError):
        return ""


def ask_to_stop(run: Path, job: str) -> None:
    """Have ``job`` not be requeued, and its ranks save and stop, if it runs."""
    atomic_write(run / JOB_STOP, f"{job}\n")
