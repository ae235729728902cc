"""Whether a run's end is that of an undisturbed one, and whether its ledger shows exactly once."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from dsasr.checkpoint.locate import checkpoint_folder, list_checkpoints, newest_whole
from dsasr.checkpoint.tensor_fragments import FragmentReader
from dsasr.data.shards.index import index_path, load_index
from dsasr.data.shards.storage import Sources
from dsasr.recipe import Recipe
from dsasr.tracking.monitor import LEDGER, METRICS
from dsasr.utils.io import read_lines

CLOCK = re.compile(r"seconds|_per_|_share|queue")  # metrics that depend on the clock


def differences(calm: Path, run: Path) -> list[str]:
    """How the end of ``run`` differs from that of ``calm``."""
    found, one, other = [], last(calm), last(run)
    if one is None or other is None:
        return [f"{calm if one is None else run} has no whole checkpoint"]
    for key in ("steps", "progress", "streams", "branches"):
        if one.manifest[key] != other.manifest[key]:
            found.append(f"{key} of the last checkpoint")
    found += _weights(one, other, "")
    found += _lines("metrics", _trace(calm), _trace(run))
    return found + _lines("ledger", _read(calm / LEDGER), _read(run / LEDGER))


def repeated(again: Path, run: Path) -> list[str]:
    """How the sft branch of ``run`` differs from that of a colocated run with the same swaps."""
    one, other = last(again), last(run)
    if one is None or other is None:
        return [f"{again if one is None else run} has no whole checkpoint"]
    mine, theirs = (
        # Steps are counted over both branches there.
        [{**line, "steps": 0} for line in _read(folder / LEDGER) if line["branch"] == "sft"]
        for folder in (again, run)
    )
    return _weights(one, other, "sft/") + _lines("sft ledger", mine, theirs)


def _weights(one: FragmentReader, other: FragmentReader, prefix: str) -> list[str]:
    keys = {k for k in one.shapes if k.startswith(prefix)}
    if keys != {k for k in other.shapes if k.startswith(prefix)}:
        return ["the tensors of the last checkpoint"]
    return [k for k in sorted(keys) if not torch.equal(one.whole(k), other.whole(k))]


def _lines(what: str, mine: list[dict], theirs: list[dict]) -> list[str]:
    """Where two files of JSON lines part."""
    found = []
    if len(mine) != len(theirs):
        found.append(f"{len(theirs)} lines of {what} instead of {len(mine)}")
    for number, (a, b) in enumerate(zip(mine, theirs, strict=False), 1):
        if a != b:
            keys = [k for k in a if a.get(k) != b.get(k)]
            return [*found, f"line {number} of the {what}: {', '.join(keys)}"]
    return found


def last(run: Path) -> FragmentReader | None:
    """The newest whole checkpoint."""
    path, _ = newest_whole(checkpoint_folder(run))
    return FragmentReader(path) if path else None


def newest_steps(run: Path) -> int:
    """After how many steps the newest published checkpoint was written; 0: there is none."""
    paths = list_checkpoints(checkpoint_folder(run))
    return int(paths[-1].name.partition("-")[2]) if paths else 0


def finished(run: Path) -> bool:
    try:
        lines = read_lines(run / "events.jsonl")
        return bool(lines) and json.loads(lines[-1])["event"] == "finished"
    except (OSError, ValueError):
        return False


def _read(path: Path) -> list[dict[str, Any]]:
    lines = read_lines(path) if path.is_file() else []
    return [json.loads(line) for line in lines]


def _trace(run: Path) -> list[dict[str, str]]:
    """The metrics without what a clock said, NaN made comparable."""
    lines = _read(run / METRICS)
    return [{k: repr(v) for k, v in line.items() if not CLOCK.search(k)} for line in lines]


# -- exactly once --------------------------------------------------------------------------------


@dataclass
class Balance:
    """What a ledger holds, and what is wrong with it."""

    steps: int = 0
    samples: int = 0
    epochs: int = 0  # whole ones
    faults: list[str] = field(default_factory=list)


def balance(run: Path, recipe: Recipe) -> Balance:
    """Whether the ledger of a finished run shows every step once and, over all ranks, every sample
    once an epoch.

    Samples are those of the shards' indexes, without those that the run has dropped and named. A
    stage's last epoch is cut off: no sample of it may come twice. What a mixture of data sets
    calls an epoch differs by set, so that a stage with more than one is held to its steps alone.
    """
    found, lines = Balance(), _read(run / LEDGER)
    found.steps = len(lines)
    steps, of_stage = defaultdict(list), defaultdict(lambda: defaultdict(Counter))
    for line in lines:
        steps[line["branch"], line["stage"]].append(line["step"])
        for micro in line["samples"]:
            for epoch, keys in micro:
                found.samples += len(keys)
                of_stage[line["stage"]][epoch].update(keys)
    if not lines:
        found.faults.append(f"{run} has no ledger")
    if [line["steps"] for line in lines] != list(range(1, len(lines) + 1)):
        found.faults.append("the ledger's steps are not 1, 2, 3 …")
    branches = {branch for branch, _ in steps}
    for stage in recipe.stages:
        made = steps.get((stage.branch, stage.name), [])
        if stage.branch in branches and made != list(range(1, stage.steps + 1)):
            found.faults.append(f"the ledger of stage {stage.name} lacks steps, or has some twice")
    dropped = {bad["key"] for bad in _read(run / "bad_samples.jsonl") if "key" in bad}
    for stage in recipe.stages:
        _, datasets = recipe.dataloader(stage)
        if len(datasets) == 1 and stage.name in of_stage:
            wanted = _keys(datasets[0].shards)
            _epochs(found, stage.name, of_stage[stage.name], wanted, dropped)
    return found


def _epochs(
    found: Balance, stage: str, epochs: dict[int, Counter], wanted: set[str], dropped: set[str]
) -> None:
    for epoch, keys in sorted(epochs.items()):
        twice = [key for key, times in keys.items() if times > 1]
        strange = set(keys) - wanted
        missing = wanted - dropped - set(keys) if epoch < max(epochs) else set()
        for what, which in (("twice", twice), ("unknown", strange), ("missing", missing)):
            if which:
                named = ", ".join(sorted(which)[:3])
                found.faults.append(f"{stage}, epoch {epoch}: {len(which)} {what} ({named} …)")
        found.epochs += epoch < max(epochs)


def _keys(shards: str | Iterable[str]) -> set[str]:
    """Of all samples in local shards."""
    spec = shards if isinstance(shards, str) else list(shards)
    return {
        key for tar in Sources().resolve(spec).shards for key in load_index(index_path(tar)).keys
    }
