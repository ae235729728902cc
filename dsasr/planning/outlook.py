"""What a run will take of this machine, for ``dsasr train --check``: memory, hours, disk."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path

import torch

from dsasr.planning.cluster_sizing import StepCost, disk_bytes, estimate_step
from dsasr.planning.measure_rate import measure_rate
from dsasr.planning.memory import GB, Machine, Traffic
from dsasr.planning.model_parts import ModelPart, count_parts, used_parts
from dsasr.recipe import Recipe
from dsasr.utils.columns import columns
from dsasr.utils.memory import available_bytes
from dsasr.utils.troubleshooting import see

SUSTAINED = 0.5  # of the rate of large products, that a training step reaches (**ours**)
LONG = 100.0  # hours from which on a run on a CPU is compared with GPUs


@dataclass(frozen=True)
class Outlook:
    """A run on this machine, by the plan's arithmetic (`dsasr.planning.cluster_sizing`)."""

    machine: Machine
    device: str
    costs: tuple[StepCost, ...]  # of the stages that this job trains
    elsewhere: str  # the hours on GPUs, where a CPU takes many; empty: not needed
    parts: dict[str, float]  # name → parameters, of the parts in use
    trains: Mapping[str, Sequence[str]]  # stage → parts
    hours_of_data: Mapping[str, float]  # stage → hours of its mixture, over the share of speech
    disk: float  # bytes that checkpoints and snapshots take at most
    free: float  # bytes free where the run writes
    folder: Path

    @property
    def hours(self) -> float:
        return sum(cost.steps * cost.seconds for cost in self.costs) / 3600

    @property
    def fullest(self) -> StepCost:
        return max(self.costs, key=lambda cost: cost.peak)


def outlook(
    recipe: Recipe, utterance: tuple[float, float], hours_of_data: Mapping[str, float]
) -> Outlook:
    """``utterance``: seconds of an average one, its tokens a second (0: `Traffic`'s);
    ``hours_of_data``: of each stage's mixture, over its share of
    speech. Takes a second, in which products are measured.

    Raises `UserError` where the shape of a model is not known.
    """
    given = [a or b for a, b in zip(utterance, astuple(Traffic()), strict=True)]
    traffic, parts = Traffic(*given), count_parts(recipe)
    machine, device = this_machine()
    stages = [s for s in recipe.stages if recipe.branch in ("both", s.branch)]
    costs = tuple(estimate_step(recipe, stage, machine, traffic, parts) for stage in stages)
    found = Outlook(
        machine=machine,
        device=device,
        costs=costs,
        elsewhere="",
        parts={name: parts[name].parameters for name in used_parts(recipe)},
        trains={stage.name: tuple(stage.trains) for stage in stages},
        hours_of_data=hours_of_data,
        disk=disk_bytes(recipe, parts),
        free=_free(recipe.folder),
        folder=recipe.folder,
    )
    if machine.cpu and found.hours > LONG:
        return replace(found, elsewhere=_on_gpus(recipe, traffic, parts))
    return found


def this_machine() -> tuple[Machine, str]:
    """What one ``dsasr train`` on this machine uses by default, and its name."""
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        memory = torch.cuda.get_device_properties(0).total_memory / GB
        machine = Machine(1, count, memory, SUSTAINED * measure_rate())
        return machine, f"{count} x {torch.cuda.get_device_name(0)}"
    memory, rate = available_bytes() / GB, SUSTAINED * measure_rate()
    return Machine(1, 1, memory, rate, cpu=True, reserve=0.0), "1 CPU rank"


def _on_gpus(recipe: Recipe, traffic: Traffic, parts: Mapping[str, ModelPart]) -> str:
    size = recipe.slurm.size
    machine = Machine(nodes=size.nodes, gpus=size.gpus or 8)
    stages = [s for s in recipe.stages if recipe.branch in ("both", s.branch)]
    costs = [estimate_step(recipe, stage, machine, traffic, parts) for stage in stages]
    hours = sum(cost.steps * cost.seconds for cost in costs) / 3600
    return (
        f"{machine.world} GPUs of {machine.memory:g} GB at {machine.rate:g} TFLOP/s: "
        f"{hours_text(hours)}, up to {max(c.peak for c in costs):.3g} GB each (dsasr plan cluster)"
    )


def _free(folder: Path) -> float:
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return float(shutil.disk_usage(there).free)


# -- text --------------------------------------------------------------------------------------


def lines(found: Outlook) -> list[str]:
    """Memory, time and disk, a row for each stage."""
    machine = found.machine
    sizes = ", ".join(f"{name} {count / 1e6:,.4g} M" for name, count in found.parts.items())
    rows = [["PLAN", "trains", "steps", "epochs", "memory GB", "s a step", "time"]]
    for cost in found.costs:
        data = found.hours_of_data.get(cost.stage, 0.0)
        epochs = f"{cost.steps * cost.audio_hours / data:,.3g}" if data else "-"
        hours = hours_text(cost.steps * cost.seconds / 3600)
        numbers = [f"{cost.steps:,}", epochs, f"{cost.peak:.3g}", f"{cost.seconds:.2g}", hours]
        rows.append([f"  {cost.stage}", ", ".join(found.trains[cost.stage]), *numbers])
    return [
        *columns(rows, left=(0, 1)),
        f"  on {found.device} with {machine.memory:.3g} GB, at half of the "
        f"{machine.rate / SUSTAINED:.2g} TFLOP/s measured now: about {hours_text(found.hours)}, by "
        "arithmetic",
        *([f"  on {found.elsewhere}"] if found.elsewhere else []),
        f"  parameters: {sizes}",
        f"  checkpoints and snapshots: up to {size_text(found.disk)}; "
        f"{size_text(found.free)} are free at {found.folder}",
    ]


def warnings(found: Outlook) -> list[str]:
    cost = found.fullest
    if cost.peak <= found.machine.memory:
        return []
    return [
        f"stage '{cost.stage}' takes about {cost.peak:.3g} GB, {found.machine.memory:.3g} GB are "
        f"there: smaller data.dataloader.batch.frames, or the stage's own batch.frames (dsasr plan "
        f"batch finds them){see('out-of-memory')}"
    ]


def faults(found: Outlook) -> list[str]:
    if found.free >= found.disk:
        return []
    return [
        f"{found.folder}: checkpoints and snapshots take up to {size_text(found.disk)}, "
        f"{size_text(found.free)} are free: free some, give run=FOLDER elsewhere, or lower "
        f"checkpoint.keep{see('disk')}"
    ]


def hours_text(hours: float) -> str:
    """``0.12 s``, ``40 s``, ``12 min``, ``5.3 h`` or ``3.1 days``."""
    if hours < 1 / 60:
        seconds = hours * 3600
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    if hours < 1:
        return f"{hours * 60:.0f} min"
    return f"{hours:.1f} h" if hours < 48 else f"{hours / 24:,.1f} days"


def size_text(size: float) -> str:
    """``size`` bytes as ``41.2 GB`` or ``3.5 MB``."""
    return f"{size / 1e9:,.3g} GB" if size >= 1e9 else f"{size / 1e6:.3g} MB"
