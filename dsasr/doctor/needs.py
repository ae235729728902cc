"""What a recipe needs of its machines, by the plan's figures (`dsasr plan cluster`)."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from dsasr.data.shards.storage import ShardStorage
from dsasr.doctor.findings import Needs
from dsasr.planning.cluster_sizing import (
    FLAC_BYTES,
    StepCost,
    checkpoint_bytes,
    disk_bytes,
    estimate_step,
)
from dsasr.planning.memory import Machine
from dsasr.planning.model_parts import count_parts
from dsasr.recipe import Recipe


def needs(recipe: Recipe, machine: Machine) -> Needs:
    """Of ``recipe`` on ``machine``. Raises `UserError` where the shape of a model is not known."""
    parts = count_parts(recipe)
    stages = [s for s in recipe.stages if recipe.branch in ("both", s.branch)]
    costs = [estimate_step(recipe, stage, machine, parts=parts) for stage in stages]
    rates = {
        stage.name: cost.audio_hours * 3600 * FLAC_BYTES * (1 - stage.text_share) / _seconds(cost)
        for stage, cost in zip(stages, costs, strict=True)
    }
    fastest = max(rates, key=rates.__getitem__)
    saved = checkpoint_bytes(recipe, parts)
    limit, reason = _save_limit(recipe, min(map(_seconds, costs)))
    return Needs(rates[fastest], fastest, saved, disk_bytes(recipe, parts), limit, reason)


def _seconds(cost: StepCost) -> float:
    """Of a step that does not wait for its data."""
    return replace(cost, reading=0.0).seconds


def _save_limit(recipe: Recipe, step_seconds: float) -> tuple[float, str]:
    config = recipe.checkpoint
    limits = []
    if config.every_minutes:
        limits.append((config.every_minutes * 60, "checkpoint.every_minutes"))
    if config.every_steps:
        limits.append((config.every_steps * step_seconds, "checkpoint.every_steps"))
    if "SLURM_JOB_ID" in os.environ:
        limits.append((float(recipe.slurm.signal), "slurm.signal"))
    return min(limits, default=(0.0, ""))


def machine_of(world: int, nodes: int, gpu_memory: float, rate: float, link: float) -> Machine:
    """The job's machine as the plan takes it: measured where measured, else the plan's figures.

    ``rate``: TFLOP/s of a rank; ``link``: GB/s of the all-reduce (0: not measured).
    """
    default = Machine()
    machine = Machine(
        nodes=nodes, gpus=max(world // nodes, 1), memory=gpu_memory or default.memory,
        rate=rate or default.rate, cpu=not gpu_memory,
    )  # fmt: skip
    return replace(machine, inside=link, network=link) if link else machine


def shards_of_ranks(recipe: Recipe, world: int, most: int = 4) -> list[list[str]]:
    """For each rank some shards of the training set to read, others for other ranks.

    Raises what `ShardStorage.resolve` raises.
    """
    storage = ShardStorage(recipe.data.dataloader.source)
    names = [name for data in recipe.data.train for name in storage.resolve(data.shards).shards]
    return [names[rank % len(names) :: world][:most] for rank in range(world)]


def run_folder(recipe: Recipe) -> Path:
    """Where the checkpoints go."""
    return recipe.folder.absolute()
