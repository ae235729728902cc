"""Comparison of a killed run with its baseline, and the check of a run's ledger of samples."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from dsasr.checkpoint.locate import checkpoint_folder, list_checkpoints, newest_whole
from dsasr.checkpoint.tensor_fragments import FragmentReader
from dsasr.data.shards.index import index_path, load_index
from dsasr.data.shards.storage import ShardStorage
from dsasr.recipe import Recipe
from dsasr.tracking.run_log import Row, read_ledger, read_metrics
from dsasr.utils.io import read_json_lines

# Metrics that depend on wall-clock time, or on what else the process holds.
TIMED = re.compile(r"seconds|_per_|_share|queue|memory")


def differences(baseline: Path, run: Path) -> list[str]:
    """How ``run`` differs from ``baseline``: last checkpoint, metrics, ledger."""
    expected, actual = last_checkpoint(baseline), last_checkpoint(run)
    if expected is None or actual is None:
        return [f"{baseline if expected is None else run} has no whole checkpoint"]
    keys = ("steps", "progress", "streams", "branches")
    return [
        *(
            f"{k} of the last checkpoint"
            for k in keys
            if expected.manifest[k] != actual.manifest[k]
        ),
        *_tensor_differences(expected, actual),
        *_row_differences("metrics", _untimed_metrics(baseline), _untimed_metrics(run)),
        *_row_differences("ledger", read_ledger(baseline), read_ledger(run)),
    ]


def sft_differences(repeated: Path, run: Path) -> list[str]:
    """How the sft branch of ``run`` differs from that of a colocated run with the same swaps."""
    expected, actual = last_checkpoint(repeated), last_checkpoint(run)
    if expected is None or actual is None:
        return [f"{repeated if expected is None else run} has no whole checkpoint"]
    expected_rows, rows = (
        # A colocated run counts the steps of both branches.
        [{**row, "steps": 0} for row in read_ledger(folder) if row["branch"] == "sft"]
        for folder in (repeated, run)
    )
    return [
        *_tensor_differences(expected, actual, "sft/"),
        *_row_differences("sft ledger", expected_rows, rows),
    ]


def _tensor_differences(
    expected: FragmentReader, actual: FragmentReader, prefix: str = ""
) -> list[str]:
    """Names of tensors that are not bit-equal."""
    keys = {k for k in expected.shapes if k.startswith(prefix)}
    if keys != {k for k in actual.shapes if k.startswith(prefix)}:
        return ["the tensors of the last checkpoint"]
    return [k for k in sorted(keys) if not torch.equal(expected.whole(k), actual.whole(k))]


def _row_differences(name: str, expected: list[Row], actual: list[Row]) -> list[str]:
    """The first line in which two logs differ, and whether their lengths do."""
    problems = []
    if len(expected) != len(actual):
        problems.append(f"{len(actual)} lines of {name} instead of {len(expected)}")
    for number, (a, b) in enumerate(zip(expected, actual, strict=False), 1):
        if a != b:
            keys = [k for k in a if a.get(k) != b.get(k)]
            return [*problems, f"line {number} of the {name}: {', '.join(keys)}"]
    return problems


def last_checkpoint(run: Path) -> FragmentReader | None:
    """The newest checkpoint whose checksums match."""
    path, _ = newest_whole(checkpoint_folder(run))
    return FragmentReader(path) if path else None


def newest_checkpoint_steps(run: Path) -> int:
    """Optimizer steps of the newest checkpoint; 0 without one."""
    paths = list_checkpoints(checkpoint_folder(run))
    return int(paths[-1].name.partition("-")[2]) if paths else 0


def _untimed_metrics(run: Path) -> list[dict[str, str]]:
    """The metrics without those that depend on wall-clock time; as text, so that NaN equals NaN."""
    rows = read_metrics(run)
    return [{k: repr(v) for k, v in row.items() if not TIMED.search(k)} for row in rows]


# -- exactly once --------------------------------------------------------------------------------


@dataclass
class LedgerCheck:
    """The counts of a ledger and its faults; a ledger without faults has passed."""

    steps: int = 0
    samples: int = 0
    epochs: int = 0  # complete ones
    faults: list[str] = field(default_factory=list)


def check_ledger(run: Path, recipe: Recipe) -> LedgerCheck:
    """Whether the ledger of a finished run has every step once and, over all ranks, every sample
    once an epoch.

    The samples are those in the shards' indexes but not in the log of bad samples. In a stage's
    last epoch, which ends early, samples may be missing but not repeated. Of a stage with more than
    one dataset only the steps are checked, for epochs differ by dataset.
    """
    check, rows = LedgerCheck(), read_ledger(run)
    check.steps = len(rows)
    steps, epochs = defaultdict(list), defaultdict(lambda: defaultdict(Counter))
    for row in rows:
        steps[row["branch"], row["stage"]].append(row["step"])
        for micro_batches in row["samples"]:
            for epoch, keys in micro_batches:
                check.samples += len(keys)
                epochs[row["stage"]][epoch].update(keys)
    if not rows:
        check.faults.append(f"{run} has no ledger")
    if [row["steps"] for row in rows] != list(range(1, len(rows) + 1)):
        check.faults.append("the ledger's steps are not 1, 2, 3 …")
    branches = {branch for branch, _ in steps}
    for stage in recipe.stages:
        stage_steps = steps.get((stage.branch, stage.name), [])
        if stage.branch in branches and stage_steps != list(range(1, stage.steps + 1)):
            check.faults.append(f"the ledger of stage {stage.name} lacks steps, or repeats some")
    bad = {row["key"] for row in read_json_lines(run / "bad_samples.jsonl") if "key" in row}
    for stage in recipe.stages:
        _, datasets = recipe.dataloader(stage)
        if len(datasets) == 1 and stage.name in epochs:
            expected = sample_keys(datasets[0].shards)
            _check_epochs(check, stage.name, epochs[stage.name], expected, bad)
    return check


def _check_epochs(
    check: LedgerCheck, stage: str, epochs: dict[int, Counter], expected: set[str], bad: set[str]
) -> None:
    for epoch, counts in sorted(epochs.items()):
        complete = epoch < max(epochs)
        check.epochs += complete
        faulty = {
            "repeated": [key for key, count in counts.items() if count > 1],
            "unknown": set(counts) - expected,
            "missing": expected - bad - set(counts) if complete else set(),
        }
        for fault, keys in faulty.items():
            if keys:
                examples = ", ".join(sorted(keys)[:3])
                check.faults.append(f"{stage}, epoch {epoch}: {len(keys)} {fault} ({examples} …)")


def sample_keys(shards: str | Iterable[str]) -> set[str]:
    """The keys of all samples in local shards."""
    spec = shards if isinstance(shards, str) else list(shards)
    return {
        key
        for tar in ShardStorage().resolve(spec).shards
        for key in load_index(index_path(tar)).keys
    }
