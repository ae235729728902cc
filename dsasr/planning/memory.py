"""Memory of a GPU, or of a rank on a CPU, in a training step, by part: the package's one planner.

ZeRO-3's shares are counted exactly, and so are its buffers, which DeepSpeed's settings size. What
the language model's and the Conformer's layers save for the backward pass was counted by autograd's
hooks on layers of several widths; what other parts save is counted so at each plan
(`dsasr.planning.module_cost`). ``tools/bench/memory.py`` measures how far the sum is from a run's
(tools/experiments/LOG.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from dsasr.data.dataloader.bucketing import FRAMES_PER_SECOND
from dsasr.engine.config import read_ds_config
from dsasr.kernels.linear_cross_entropy import chunk_rows
from dsasr.model.encoders.conformer import EncoderConfig
from dsasr.model.lora import BASE
from dsasr.planning.model_parts import ASSUMED_UNITS_PER_SECOND, ModelPart
from dsasr.recipe import Recipe
from dsasr.stages import StageConfig

GB = 1e9
# Bytes of a parameter in bf16, of its gradient, and of its fp32 master weight and Adam moments.
WEIGHT, GRADIENT, STATES = 2, 2, 12
# Parts of the memory that are also taken between steps.
RESIDENT = ("weights", "gradients", "optimizer", "bucket", "offloaded", "reserve", "heap")
# DeepSpeed's defaults, in elements. Gradients gather in a bucket until it is full. A gathered
# weight stays where its next use is near, so the last weights of the forward pass are still there
# for the backward pass. ``PREFETCH`` elements are gathered ahead.
BUCKET, REUSE, PREFETCH = 500_000_000, 1_000_000_000, 50_000_000
# What a CPU rank takes beside that (**ours**, fitted to measured runs): buffers of the libraries,
# in GB and as a share of what is resident; and the heap's holes, as a share of what comes and goes
# within a step.
BUFFERS, BUFFERS_SHARE, HOLES = 0.04, 0.02, 0.1
# Distance from the input.
DEPTH = {
    "encoder": 0, "encoder_lora": 0, "layer_sum": 1, "ctc": 1, "adaptor": 2, "llm": 3, "lora": 3,
}  # fmt: skip


@dataclass(frozen=True)
class Machine:
    """GPUs and what connects them; rates as sustained, not as advertised."""

    nodes: int = 8
    gpus: int = 8  # of a node
    memory: float = 80.0  # GB of a GPU
    rate: float = 350.0  # TFLOP/s of bf16 products
    inside: float = 200.0  # GB/s of a GPU, between the GPUs of a node
    network: float = 40.0  # GB/s of a GPU, between nodes
    storage: float = 10.0  # GB/s that all GPUs together read from the shards
    latency: float = 20e-6  # seconds of a collective, plus as much for each doubling of the ranks
    reserve: float = 3.0  # GB that CUDA, NCCL and fragmentation take
    cpu: bool = False  # no GPU: ranks are processes, and untouched pages take no memory

    @property
    def world(self) -> int:
        """Ranks: one for each GPU."""
        return self.nodes * self.gpus


@dataclass(frozen=True)
class Traffic:
    """The average utterance."""

    seconds: float = 8.0
    tokens: float = 4.0  # transcript tokens a second


@dataclass(frozen=True)
class MicroBatch:
    """One micro-batch of one rank, filled to its budget with utterances that are all alike."""

    utterances: float
    views: int  # of each utterance: 2 of CR-CTC
    seconds: float  # of an utterance
    rows: int  # feature rows of an utterance
    frames: int  # encoder frames of an utterance
    adaptor_inputs: float  # what the adaptor reads of an utterance: encoder frames, or units of CTC
    positions: float  # of the language model for an utterance: prompt, speech, transcript
    targets: float  # of the language model for an utterance: transcript and end token

    @property
    def audio_seconds(self) -> float:
        return self.utterances * self.seconds

    @classmethod
    def of(
        cls,
        recipe: Recipe,
        stage: StageConfig,
        traffic: Traffic,
        parts: Mapping[str, ModelPart],
    ) -> MicroBatch:
        """The micro-batches of ``stage``; ``parts``: at least the encoder."""
        batch, adaptor = recipe.dataloader(stage)[0].batch, recipe.model.adaptor
        speech, seconds = parts["encoder"].speech, traffic.seconds
        rows = speech.rows(seconds)
        inputs = frames = speech.frames(rows)
        if adaptor.frames_per_token is None:
            inputs = seconds * ASSUMED_UNITS_PER_SECOND
        text = seconds * traffic.tokens
        positions = batch.prompt_tokens + inputs / (adaptor.frames_per_token or 1) + text
        utterances = batch.frames / FRAMES_PER_SECOND / seconds
        if batch.tokens and stage.branch == "sft":
            utterances = min(utterances, batch.tokens / positions)
        return cls(
            utterances=min(utterances, batch.samples),
            views=2 if stage.objective == "cr_ctc" else 1,
            seconds=seconds,
            rows=rows,
            frames=frames,
            adaptor_inputs=inputs,
            positions=positions,
            targets=text + 1,
        )


def stages_beside(recipe: Recipe, stage: StageConfig) -> list[StageConfig]:
    """Stages of the other branch that may be offloaded beside ``stage`` in the same job.

    The pretrain branch is closed when the sft branch has taken the final encoder.
    """
    schedule = recipe.schedule()
    if recipe.branch != "both" or not schedule.pretrain or not schedule.sft:
        return []
    if stage.branch == "pretrain":
        return [s for s in schedule.sft if not s.trains_sft_encoder]
    return [] if stage.trains_sft_encoder else list(schedule.pretrain)


def resident_parts(recipe: Recipe, stage: StageConfig) -> list[str]:
    """Names of the parts whose weights a rank has its share of during ``stage``; the encoder twice
    where both branches are in one job."""
    beside = stages_beside(recipe, stage)
    branches = [stage.branch, *(s.branch for s in beside[:1])]
    return [part for branch in branches for part in recipe.parts(branch)]


def step_memory(
    recipe: Recipe,
    stage: StageConfig,
    machine: Machine,
    parts: Mapping[str, ModelPart],
    traffic: Traffic | None = None,
) -> dict[str, float]:
    """GB of one rank by part, at the step's fullest moment: the backward pass of a full batch.

    ``parts``: at least those of `resident_parts` (`model_parts.count_parts`).
    """
    at = MicroBatch.of(recipe, stage, traffic or Traffic(), parts)
    used = recipe.parts(stage.branch)
    wide = 2 if uses_float32(recipe, machine) else 1  # times the bytes in bf16
    zero = read_ds_config(recipe.engine.deepspeed).get("zero_optimization", {})
    memory = _shares(recipe, stage, machine, parts, zero)
    trained = sum(parts[n].parameters for n in stage.trains)
    bucket = int(zero.get("reduce_bucket_size", BUCKET))
    filled = min(trained, bucket) * GRADIENT * wide
    # The bucket is allocated whole; on a CPU only the touched pages take memory.
    memory["bucket"] = filled if machine.cpu else bucket * GRADIENT * wide
    # Its content is copied for the collective; gloo copies it once more.
    memory["reducing"] = filled * (2 if machine.cpu else 1)
    memory["gathered"] = _gathered(stage, zero, parts, used) * WEIGHT * wide
    memory["activations"] = sum(
        activation_bytes(recipe, stage, machine, name, parts[name], at) for name in used
    )
    if stage.branch == "sft" and not machine.cpu:  # a CPU's chunks are small
        memory["head"] = head_bytes(parts["llm"], "llm" in stage.trains, at)
    values = at.utterances * at.rows * parts["encoder"].speech.bins
    memory["features"] = values * 4 * 2  # float32, in two copies
    memory = {name: value / GB for name, value in memory.items()}
    memory["reserve"] = machine.reserve
    if machine.cpu:
        resident = between_steps(memory)
        memory["holes"] = HOLES * (sum(memory.values()) - resident)
        memory["heap"] = BUFFERS + BUFFERS_SHARE * resident
    return memory


def between_steps(memory: Mapping[str, float]) -> float:
    """GB of `step_memory` that are also taken between steps."""
    return sum(memory.get(name, 0.0) for name in RESIDENT)


def uses_float32(recipe: Recipe, machine: Machine) -> bool:
    """Whether weights and activations are float32, twice as wide as bf16."""
    precision = recipe.engine.precision
    return precision == "fp32" or (precision == "auto" and machine.cpu)


def _shares(
    recipe: Recipe,
    stage: StageConfig,
    machine: Machine,
    parts: Mapping[str, ModelPart],
    zero: Mapping[str, Any],
) -> dict[str, float]:
    """Bytes of a rank's ZeRO-3 share of weights, gradients and optimizer states."""
    wide = 2 if uses_float32(recipe, machine) else 1
    weights = sum(parts[n].parameters for n in resident_parts(recipe, stage))
    shares = {"weights": weights * WEIGHT * wide / machine.world}
    on_host = (zero.get("offload_optimizer") or {}).get("device") in ("cpu", "nvme")
    if on_host and not machine.cpu:
        return shares
    trained = sum(parts[n].parameters for n in stage.trains)
    shares["gradients"] = trained * GRADIENT * wide / machine.world
    shares["optimizer"] = trained * STATES / machine.world
    device = recipe.engine.offload.device
    beside = stages_beside(recipe, stage)
    if beside and (device == "none" or (device == "cpu" and machine.cpu)):
        most = max(sum(parts[n].parameters for n in s.trains) for s in beside)
        shares["offloaded"] = most * STATES / machine.world
    return shares


def _gathered(
    stage: StageConfig,
    zero: Mapping[str, Any],
    parts: Mapping[str, ModelPart],
    used: tuple[str, ...],
) -> float:
    """The most parameters that are gathered at once: those of the end of the forward pass that the
    backward pass uses soon, one module in use, and what is prefetched."""
    near = int(zero.get("stage3_max_reuse_distance", REUSE)) / 2  # forward and back again
    ahead = int(zero.get("stage3_prefetch_bucket_size", PREFETCH))
    behind = sum(parts[n].parameters for n in used if has_backward(stage, n))
    needed = min(behind, near) + ahead + max(parts[n].largest for n in used)
    limit = int(zero.get("stage3_max_live_parameters", REUSE))
    return min(sum(parts[n].parameters for n in used), needed, limit)


def has_backward(stage: StageConfig, part: str) -> bool:
    """Whether the backward pass of ``stage`` reaches that part."""
    return DEPTH[part] >= min(DEPTH[p] for p in stage.trains)


# -- activations -------------------------------------------------------------------------------


def activation_bytes(
    recipe: Recipe,
    stage: StageConfig,
    machine: Machine,
    name: str,
    part: ModelPart,
    at: MicroBatch,
) -> float:
    """Bytes of a part that a micro-batch saves for the backward pass, or that one of its layers
    uses where there is no backward pass."""
    float32 = uses_float32(recipe, machine)
    value = 4 if float32 else 2  # bytes
    utterances = at.utterances * at.views
    if name in ("ctc", "adaptor"):
        rows = at.frames if name == "ctc" else round(at.adaptor_inputs)
        return utterances * sum(part.cost.saved(rows, float32, machine.cpu))
    if name == "layer_sum":
        return utterances * value * at.frames * part.saved if has_backward(stage, name) else 0.0
    positions = at.frames if BASE.get(name, name) == "encoder" else at.positions
    if name in BASE:
        return utterances * value * positions * _lora_values(recipe, stage, part, name)
    if name == "encoder":
        config, width = recipe.model.encoder, part.speech.width
        front, layer = _encoder_bytes(recipe, machine, part, at)
        front = 0.0 if "encoder_lora" in stage.trains else front
    else:
        config, width = recipe.model.llm, part.shape.width
        upcast = 0.0 if float32 else part.upcast
        front, layer = 0.0, value * positions * (part.saved + upcast) / part.layers
    if not has_backward(stage, name):
        return utterances * layer
    if not config.activation_checkpointing:
        return utterances * (front + layer * part.layers)
    # A checkpointed layer keeps its input, or with recompute=cheap the results of its products,
    # about half of what it saves.
    kept = layer / 2 if config.recompute == "cheap" else value * positions * width
    return utterances * (front + kept * part.layers + layer)


def head_bytes(llm: ModelPart, trained: bool, at: MicroBatch) -> float:
    """Bytes of the head's gradients, which the forward pass makes on a GPU: a chunk's logits, and
    float32 sums of the hidden states' gradient and of the weight's."""
    rows, shape = round(at.utterances * at.targets), llm.shape
    chunk = min(rows, chunk_rows(rows, shape.vocab, torch.device("cuda")))
    return 4.0 * (chunk * shape.vocab + rows * shape.width + trained * shape.vocab * shape.width)


def _encoder_bytes(
    recipe: Recipe, machine: Machine, part: ModelPart, at: MicroBatch
) -> tuple[float, float]:
    """Bytes that an utterance leaves in the encoder: (in its front end, in one layer)."""
    float32 = uses_float32(recipe, machine)
    if recipe.pretrained_encoder is not None:
        return part.cost.saved(at.rows, float32, machine.cpu)
    scale = (4 if float32 else 2) * at.frames
    front, layer = conformer_values(recipe.model.encoder, float32, machine.cpu, at.frames)
    return scale * front, scale * layer


def conformer_values(
    config: EncoderConfig, float32: bool, cpu: bool, length: float
) -> tuple[float, float]:
    """(values that the Conformer's front end saves for one frame, values of one layer), for an
    utterance of ``length`` frames."""
    mels = (config.mels - 1) // 2, ((config.mels - 1) // 2 - 1) // 2
    # Two convolutions' inputs and outputs, the first at twice the frame rate.
    front = (2 * mels[0] + mels[1]) * config.subsample_channels + 4 * config.mels
    # Masks of dropout: bytes on a GPU, values on a CPU.
    masks = (4 if cpu else 4 / (4 if float32 else 2)) if config.dropout else 0
    layer = (19 + masks) * config.width + 4 * config.ffn
    if cpu and length <= 512:
        layer += config.heads * length  # plain attention, which saves its softmax
    return front, layer


def _lora_values(recipe: Recipe, stage: StageConfig, part: ModelPart, name: str) -> float:
    """Values that LoRA's layers save for one position; none where LoRA is frozen, as gradients pass
    through frozen products without their inputs."""
    if name not in stage.trains:
        return 0.0
    settings = getattr(recipe.model, BASE[name])
    recomputed = settings.activation_checkpointing and settings.recompute != "cheap"
    return part.saved / part.layers if recomputed else part.saved
