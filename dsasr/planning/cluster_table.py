"""A cluster plan as text: memory of a GPU, time and traffic of a step, GPU-hours of the whole."""

from __future__ import annotations

import datetime
from collections.abc import Iterator, Mapping, Sequence

from dsasr.planning import cluster_sizing
from dsasr.planning.cluster_sizing import StepCost
from dsasr.planning.memory import Machine, Traffic
from dsasr.planning.model_parts import ModelPart, assumptions, count_parts, used_parts
from dsasr.planning.outlook import hours_text, size_text
from dsasr.recipe import Recipe
from dsasr.stages import StageConfig


def cluster_plan(
    recipe: Recipe,
    stages: Sequence[StageConfig],
    machine: Machine,
    traffic: Traffic,
    start: datetime.date,
) -> Iterator[str]:
    """The lines of the plan for ``stages``; the training begins on the day ``start``."""
    parts = count_parts(recipe)
    used = {name: parts[name].parameters / 1e6 for name in used_parts(recipe)}
    yield f"parameters: {', '.join(f'{name} {size:,.1f} M' for name, size in used.items())}"
    yield (
        f"{machine.nodes} x {machine.gpus} GPUs of {machine.memory:g} GB at "
        f"{machine.rate:.3g} TFLOP/s"
    )
    yield (
        f"assumed: utterances of {traffic.seconds:g} s, {traffic.tokens:g} transcript tokens a "
        "second (--utterance, --tokens)"
    )
    for assumption in assumptions(recipe):
        yield f"assumed: {assumption}"
    yield ""
    steps = [
        cluster_sizing.estimate_step(recipe, stage, machine, traffic, parts) for stage in stages
    ]
    yield from _memory(steps)
    yield from _time(steps, machine)
    hours = sum(step.steps * step.seconds for step in steps) / 3600
    end = start + datetime.timedelta(hours=hours)
    saved = size_text(cluster_sizing.checkpoint_bytes(recipe, parts))
    total = f"{hours_text(hours)}, {_number(hours * machine.world)} GPU-hours"
    yield f"\nfrom {start} to {end}: {total}; a checkpoint is {saved}"
    longest = max(steps, key=lambda step: step.steps * step.seconds).stage
    stage = recipe.stage(longest)
    yield from _by_size(recipe, stage, machine, traffic, parts)


def _memory(steps: Sequence[StepCost]) -> Iterator[str]:
    names = list(dict.fromkeys(name for step in steps for name in step.memory))
    yield f"{'GB of a GPU':<12} {'all':>7} " + " ".join(f"{n:>11}" for n in names)
    for step in steps:
        cells = " ".join(f"{step.memory.get(n, 0.0):>11.2f}" for n in names)
        yield f"{step.stage:<12} {step.peak:>7.1f} {cells}"


def _time(steps: Sequence[StepCost], machine: Machine) -> Iterator[str]:
    yield (
        f"\n{'stage':<12} {'steps':>10} {'s/step':>8} {'products':>9} {'network':>8} "
        f"{'GB sent':>8} {'h audio':>8} {'time':>10} {'GPU-hours':>10}  limited by"
    )
    for step in steps:
        hours = step.steps * step.seconds / 3600
        yield (
            f"{step.stage:<12} {step.steps:>10,} {_number(step.seconds):>8} "
            f"{_number(step.compute):>9} {_number(step.network):>8} "
            f"{_number(step.traffic / 1e9):>8} {_number(step.audio_hours):>8} "
            f"{hours_text(hours):>10} {_number(hours * machine.world):>10}  {step.bottleneck}"
        )


def _number(value: float) -> str:
    """In three digits, whole above a thousand: of a small run as of a large one."""
    return f"{value:,.0f}" if value >= 999.5 else f"{value:.3g}"


def _by_size(
    recipe: Recipe,
    stage: StageConfig,
    machine: Machine,
    traffic: Traffic,
    parts: Mapping[str, ModelPart],
) -> Iterator[str]:
    yield (
        f"\nstage {stage.name} by size\n{'GPUs':>5} {'GB':>6} {'s/step':>8} "
        f"{'h audio/step':>13} {'h audio/GPU-h':>14}  {'limited by':<10}  change"
    )
    for size in cluster_sizing.machine_sizes(machine):
        step = cluster_sizing.estimate_step(recipe, stage, size, traffic, parts)
        speed = step.audio_hours / (step.seconds * size.world / 3600)
        line = (
            f"{size.world:>5} {step.peak:>6.1f} {_number(step.seconds):>8} "
            f"{_number(step.audio_hours):>13} {_number(speed):>14}  {step.bottleneck:<10}  "
            f"{cluster_sizing.advice(step, size, recipe)}"
        )
        yield line.rstrip()
