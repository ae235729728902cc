"""What a recipe takes on a cluster: memory of a GPU by part, time and traffic of a step.

Arithmetic from shapes; no weight is allocated and no data is read. What is counted exactly:
parameters, multiplications (`flops`), the bytes that ZeRO-3 stores, sends and saves. What is
estimated (**ours**): the activations that a layer saves. The rate at which a GPU multiplies and the
network's bandwidth are the caller's (`Machine`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from dsasr.model.lora import BASE
from dsasr.planning import flops
from dsasr.planning.memory import (
    GB,
    GRADIENT,
    STATES,
    WEIGHT,
    Machine,
    MicroBatch,
    Traffic,
    between_steps,
    has_backward,
    step_memory,
)
from dsasr.planning.model_parts import ModelPart, count_parts
from dsasr.recipe import Recipe
from dsasr.stages import StageConfig

ENCODER_BYTES = 4  # of a parameter in a snapshot, at most
FLAC_BYTES = 16_000  # of a second of 16 kHz speech
# **Ours**: with more audio in a step its gradient has little noise left to average out.
MUCH_AUDIO = 32  # hours


@dataclass(frozen=True)
class StepCost:
    """One optimizer step of a stage on one GPU. Seconds, bytes, floating-point operations."""

    stage: str
    steps: int  # of the stage
    memory: dict[str, float]  # GB by part (`step_memory`)
    flops: float
    compute: float  # seconds of the products
    traffic: float  # bytes sent and received
    network: float  # seconds of the traffic
    latency: float  # seconds of the collectives' latencies
    reading: float  # seconds in which all GPUs read their audio from the shards
    audio_hours: float  # over all GPUs

    @property
    def seconds(self) -> float:
        """Traffic overlaps the products; its latencies do so by half (**ours**)."""
        return max(self.compute, self.network, self.reading) + self.latency / 2

    @property
    def peak(self) -> float:
        """GB at the step's fullest moment."""
        return sum(self.memory.values())

    @property
    def resident(self) -> float:
        """GB that are also taken between steps."""
        return between_steps(self.memory)

    @property
    def bottleneck(self) -> str:
        seconds = {
            "products": self.compute,
            "network": self.network,
            "latency": self.latency,
            "storage": self.reading,
        }
        return max(seconds, key=seconds.__getitem__)


def estimate_step(
    recipe: Recipe,
    stage: StageConfig,
    machine: Machine,
    traffic: Traffic | None = None,
    parts: Mapping[str, ModelPart] | None = None,
) -> StepCost:
    """One optimizer step of ``stage``; ``parts``: `count_parts` of the recipe, where at hand."""
    traffic, parts = traffic or Traffic(), parts or count_parts(recipe)
    used = recipe.parts(stage.branch)
    at = MicroBatch.of(recipe, stage, traffic, parts)
    work = micro_batch_flops(recipe, stage, at, parts).values()
    operations = stage.grad_accum_steps * sum(w.needed + w.recomputed for w in work)
    # ZeRO-3 gathers every weight for the forward and again for the backward pass, and reduces the
    # gradients of what is trained.
    world = machine.world
    share = (world - 1) / world
    backward = [n for n in used if has_backward(stage, n)]
    gathered = sum(parts[n].parameters for n in [*used, *backward]) * WEIGHT
    reduced = sum(parts[n].parameters for n in used if n in stage.trains) * GRADIENT
    sent = (gathered + reduced) * share * stage.grad_accum_steps
    bandwidth = (machine.inside if machine.nodes == 1 else machine.network) * GB
    # LoRA is gathered with the layers that it is in.
    layers = {n: 0 if n in BASE else parts[n].layers for n in used}
    collectives = sum(layers.values()) + sum(layers[n] for n in backward) * 2
    latency = machine.latency * (1 + math.log2(world)) if world > 1 else 0.0
    hours = at.audio_seconds * stage.grad_accum_steps * world / 3600
    return StepCost(
        stage=stage.name,
        steps=stage.steps,
        memory=step_memory(recipe, stage, machine, parts, traffic),
        flops=operations,
        compute=operations / (machine.rate * 1e12),
        traffic=sent,
        network=sent / bandwidth,
        latency=collectives * stage.grad_accum_steps * latency,
        reading=hours * 3600 * FLAC_BYTES / (machine.storage * GB),
        audio_hours=hours,
    )


def micro_batch_flops(
    recipe: Recipe, stage: StageConfig, at: MicroBatch, parts: Mapping[str, ModelPart]
) -> dict[str, flops.StepFlops]:
    """FLOPs of one micro-batch of one GPU by part, made of average utterances."""
    model, used = recipe.model, recipe.parts(stage.branch)
    utterance = {"encoder": parts["encoder"].cost.flops(at.rows)}
    if "encoder_lora" in used:
        adapters = parts["encoder_lora"].parameters
        utterance["encoder_lora"] = flops.encoder_lora(adapters, [at.frames])
    if "ctc" in used:
        utterance["ctc"] = parts["ctc"].cost.flops(at.frames)
    if stage.branch == "sft":
        shape = parts["llm"].shape
        utterance["adaptor"] = parts["adaptor"].cost.flops(round(at.adaptor_inputs)) + _merging(
            at, parts
        )
        if shape.adapters:
            utterance["lora"] = flops.lora(shape, [at.positions])
        utterance["llm"] = flops.llm(shape, [at.positions])
        utterance["head"] = flops.head(shape, at.targets)
    recomputes = {
        "encoder": model.encoder.activation_checkpointing and model.encoder.recompute == "all",
        "llm": model.llm.activation_checkpointing and model.llm.recompute == "all",
    }
    recomputes |= {matrices: recomputes[base] for matrices, base in BASE.items()}
    batch = {name: part.times(at.utterances * at.views) for name, part in utterance.items()}
    return flops.step_flops(batch, stage.trains, [n for n, on in recomputes.items() if on])


def _merging(at: MicroBatch, parts: Mapping[str, ModelPart]) -> flops.PartFlops:
    """The means over each unit's frames that an adaptor of kind ctc reads with ``merge``."""
    read = parts["adaptor"].cost.inputs(1)[0].shape[2]
    return flops.PartFlops(
        0, fixed=0 if at.adaptor_inputs == at.frames else 2 * at.frames * at.adaptor_inputs * read
    )


def checkpoint_bytes(recipe: Recipe, parts: Mapping[str, ModelPart]) -> float:
    """Of the largest checkpoint: weights of all branches, optimizer states of what trains."""
    total = 0.0
    for branch in ("pretrain", "sft"):
        stages = [s for s in recipe.stages if s.branch == branch]
        if recipe.branch in ("both", branch) and stages:
            total += sum(parts[n].parameters for n in recipe.parts(branch)) * WEIGHT
            total += max(sum(parts[n].parameters for n in s.trains) for s in stages) * STATES
    return total


def disk_bytes(recipe: Recipe, parts: Mapping[str, ModelPart]) -> float:
    """That a run's checkpoints and snapshots take at most."""
    kept = recipe.checkpoint.keep + recipe.checkpoint.keep_best + 1  # one while it is written
    snapshots = parts["encoder"].parameters * ENCODER_BYTES * (recipe.store.keep + 1)
    return checkpoint_bytes(recipe, parts) * kept + snapshots


def advice(cost: StepCost, machine: Machine, recipe: Recipe) -> str:
    """What the recipe should change at that size; empty: nothing."""
    if cost.peak > machine.memory:
        fixed = sum(cost.memory.get(n, 0.0) for n in ("weights", "gradients", "optimizer"))
        if fixed > machine.memory / 2:
            return "does not fit: more GPUs, or engine.deepspeed=zero3-offload (or zero3-nvme)"
        model = recipe.model
        checkpoints = model.encoder.activation_checkpointing and model.llm.activation_checkpointing
        return "does not fit: smaller batch.frames" + (
            "" if checkpoints else ", or model.….activation_checkpointing=true"
        )
    if cost.bottleneck == "storage":
        return "data.dataloader.source.cache_gb: keep the shards on the nodes' own disks"
    if cost.bottleneck == "products":
        much = cost.audio_hours > MUCH_AUDIO
        return "smaller batch.frames, or fewer steps at higher rates" if much else ""
    if machine.nodes > 1 and machine.gpus > 1 and cost.bottleneck == "network":
        return f"gather inside a node: zero_hpz_partition_size {machine.gpus}; or larger batches"
    return "larger batch.frames (fewer, longer steps), or fewer GPUs"


def machine_sizes(machine: Machine, limit: int = 1024) -> list[Machine]:
    """The same machine with 1, 2, 4 … ``limit`` GPUs."""
    machines, world = [], 1
    while world <= limit:
        gpus = min(world, machine.gpus)
        machines.append(replace(machine, nodes=world // gpus, gpus=gpus))
        world *= 2
    return machines
