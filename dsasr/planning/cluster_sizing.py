"""What a recipe takes on a cluster: memory of a GPU by part, time and traffic of a step, the whole.

Arithmetic from shapes; no weight is made and no data is read. What is counted exactly: parameters,
multiplications (`flops`), the bytes that ZeRO-3 holds, sends and saves. What is estimated
(**ours**): the activations that a layer keeps, the rate at which a GPU multiplies and the network's
share, which are the caller's to give (`Machine`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from dsasr.model import lora
from dsasr.model.adaptor import Adaptor
from dsasr.model.encoders.conformer import Encoder
from dsasr.model.llm_hub import llm_config
from dsasr.planning import flops
from dsasr.planning.memory import FRAMES, GB, GRADIENT, HELD, STATES, WEIGHT, memory, reached
from dsasr.recipe import Recipe
from dsasr.stages import StageConfig

FLAC_BYTES = 16_000  # of a second of 16 kHz speech


@dataclass(frozen=True)
class Machine:
    """A GPU and its surroundings; rates as reached, not as advertised."""

    nodes: int = 8
    gpus: int = 8
    memory: float = 80.0  # GB
    rate: float = 350.0  # TFLOP/s of bf16 products, sustained
    inside: float = 200.0  # GB/s a GPU, between the GPUs of a node
    network: float = 40.0  # GB/s a GPU, between nodes
    storage: float = 10.0  # GB/s that all GPUs together read from the shards
    latency: float = 20e-6  # s of a collective, and so much again for each doubling of the ranks
    reserve: float = 3.0  # GB that CUDA, NCCL and fragmentation take
    cpu: bool = False  # no GPU: ranks are processes, and what they do not touch takes no memory

    @property
    def world(self) -> int:
        return self.nodes * self.gpus


@dataclass(frozen=True)
class Traffic:
    """What a batch is made of, on average."""

    seconds: float = 8.0  # of an utterance
    tokens: float = 4.0  # transcript tokens in a second


@dataclass(frozen=True)
class Part:
    """One of encoder, ctc, adaptor, llm, lora. Values are saved for the backward pass."""

    parameters: int
    layers: int
    largest: int  # parameters of the largest piece that ZeRO-3 gathers at once
    shape: flops.LlmShape | None = None  # of the language model
    saved: float = 0.0  # language model, LoRA: values that all layers save, of one position
    upcast: float = 0.0  # so many more in bf16, where norms save what they take in float32


@dataclass(frozen=True)
class Step:
    """One optimizer step of a stage on one GPU. Seconds, bytes, floating point operations."""

    stage: str
    steps: int
    memory: dict[str, float]  # GB by part
    flops: float
    compute: float
    traffic: float  # bytes sent and received
    network: float  # seconds
    latency: float
    reading: float  # seconds, of the shards of all GPUs
    audio_hours: float  # over all GPUs

    @property
    def seconds(self) -> float:
        """Traffic runs beside the products, its latencies do not entirely (**ours**: half)."""
        return max(self.compute, self.network, self.reading) + self.latency / 2

    @property
    def peak(self) -> float:
        return sum(self.memory.values())

    @property
    def held(self) -> float:
        """GB that are there between steps too."""
        return sum(self.memory.get(name, 0.0) for name in HELD)

    @property
    def bottleneck(self) -> str:
        named = {"products": self.compute, "network": self.network, "latency": self.latency}
        named["storage"] = self.reading
        return max(named, key=named.__getitem__)


# -- the model ---------------------------------------------------------------------------------


def parts(recipe: Recipe, phonemes: int = 256) -> dict[str, Part]:
    """The model's parts, counted on modules without memory."""
    model = recipe.model
    chosen = llm_config(model.llm.path)
    with torch.device("meta"):
        encoder = Encoder(model.encoder)
        llm = AutoModelForCausalLM.from_config(chosen)
        adaptor = Adaptor(model.adaptor, model.encoder.width, chosen.hidden_size)
    head = model.encoder.width * phonemes + phonemes
    embedding = llm.get_input_embeddings().weight.numel()
    shape, beside = flops.LlmShape.of(llm), {}
    if model.lora is not None:
        added, layers = lora.count(llm, model.lora), chosen.num_hidden_layers
        saved = sum(_lora_saves(recipe, m) for m in lora.targeted(llm, model.lora).values())
        beside["lora"] = Part(added, layers, 0, saved=saved)
        shape = replace(shape, adapters=beside["lora"].parameters)
    return {
        "encoder": Part(_count(encoder), model.encoder.layers, _largest(encoder.blocks)),
        "ctc": Part(head, 1, head),
        "adaptor": Part(_count(adaptor), 1, _count(adaptor)),
        "llm": Part(_count(llm), shape.layers, embedding, shape, *_llm_saves(chosen, shape)),
        **beside,
    }


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _lora_saves(recipe: Recipe, layer: nn.Linear) -> float:
    """Values of a position that LoRA beside ``layer`` saves: A's result, and with dropout A's input
    and a mask of half its bytes; where products are kept, B's result."""
    chosen, llm = recipe.model.lora, recipe.model.llm
    dropped = 1.5 * layer.in_features if chosen.dropout else 0.0
    cheap = llm.activation_checkpointing and llm.recompute == "cheap"
    return chosen.rank + (layer.out_features if cheap else dropped)


def _llm_saves(config: Any, shape: flops.LlmShape) -> tuple[float, float]:
    """Values that all layers save, of one position, and how many more in bf16; counted on Qwen3 by
    autograd's hooks (no dropout, fused attention)."""
    text, width = config.get_text_config(), shape.width
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    attention = shape.attention_width * (1 + heads / text.num_attention_heads)
    ffn = getattr(text, "intermediate_size", None) or 4 * width
    saved = 6 * width + 4 * attention + 4 * ffn
    return shape.layers * saved, shape.layers * (2 * width + attention)


def _largest(blocks: nn.ModuleList) -> int:
    return max(_count(block) for block in blocks)


# -- a step ------------------------------------------------------------------------------------


def positions(recipe: Recipe, stage: StageConfig, traffic: Traffic) -> dict[str, float]:
    """What one micro-batch of one GPU gives each part to do, in positions; its seconds of
    audio, and the encoder's frames of one utterance."""
    batch = stage.batch or recipe.data.dataloader.batch
    seconds = batch.frames / FRAMES
    if batch.tokens and stage.branch == "sft":
        stack = recipe.model.adaptor.stack
        each = traffic.seconds * (25 / stack + traffic.tokens) + batch.prompt_tokens
        seconds = min(seconds, batch.tokens / each * traffic.seconds)
    utterances = min(seconds / traffic.seconds, batch.samples)
    seconds, length = utterances * traffic.seconds, traffic.seconds * 25
    if stage.branch == "pretrain":
        views = 2 if (stage.objective or "cr_ctc") == "cr_ctc" else 1
        frames = seconds * 25 * views
        return {"encoder": frames, "ctc": frames, "seconds": seconds, "length": length}
    speech = seconds * 25 / recipe.model.adaptor.stack
    text = utterances * batch.prompt_tokens + seconds * traffic.tokens
    found = {"encoder": seconds * 25, "adaptor": speech, "llm": speech + text}
    found |= {"seconds": seconds, "length": length}
    return found if recipe.model.lora is None else {**found, "lora": speech + text}


def step(
    recipe: Recipe,
    stage: StageConfig,
    machine: Machine,
    traffic: Traffic | None = None,
    counted: Mapping[str, Part] | None = None,
) -> Step:
    """One optimizer step of ``stage``."""
    traffic, counted = traffic or Traffic(), counted or parts(recipe)
    at = positions(recipe, stage, traffic)
    used = [name for name in recipe.parts(stage.branch) if name in at]
    done = work(recipe, stage, traffic, counted["llm"].shape).values()
    operations = stage.grad_accum_steps * sum(w.needed + w.recomputed for w in done)
    compute = operations / (machine.rate * 1e12)
    # ZeRO-3 gathers every weight for the forward and again for the backward pass, and reduces the
    # gradients of what is trained.
    world = machine.world
    share = (world - 1) / world
    gathered = sum(counted[n].parameters for n in used) * WEIGHT
    behind = [n for n in used if reached(stage, n)]
    again = sum(counted[n].parameters for n in behind) * WEIGHT
    reduced = sum(counted[n].parameters for n in used if n in stage.trains) * GRADIENT
    sent = (gathered + again + reduced) * share * stage.grad_accum_steps
    speed = (machine.inside if machine.nodes == 1 else machine.network) * GB
    # LoRA is gathered with the layers that it is in.
    layers = {n: counted[n].layers if n != "lora" else 0 for n in used}
    collectives = sum(layers.values()) + sum(layers[n] for n in behind) * 2
    waits = machine.latency * (1 + math.log2(world)) if world > 1 else 0.0
    hours = at["seconds"] * stage.grad_accum_steps * world / 3600
    return Step(
        stage=stage.name,
        steps=stage.steps,
        memory=memory(recipe, stage, machine, counted, at, used),
        flops=operations,
        compute=compute,
        traffic=sent,
        network=sent / speed,
        latency=collectives * stage.grad_accum_steps * waits,
        reading=hours * 3600 * FLAC_BYTES / (machine.storage * GB),
        audio_hours=hours,
    )


def work(
    recipe: Recipe, stage: StageConfig, traffic: Traffic, shape: flops.LlmShape | None
) -> dict[str, flops.Work]:
    """What one micro-batch of one GPU costs each part: so many average utterances."""
    model, batch = recipe.model, stage.batch or recipe.data.dataloader.batch
    width, frames = model.encoder.width, [traffic.seconds * FRAMES]
    at = positions(recipe, stage, traffic)
    if stage.branch == "pretrain":
        utterances = at["encoder"] / (traffic.seconds * 25)  # views count
        # A vocabulary's size is nothing beside an encoder's.
        one = {
            "encoder": flops.encoder(model.encoder, frames),
            "ctc": flops.ctc(width, 256, frames),
        }
    else:
        utterances, stack = at["seconds"] / traffic.seconds, model.adaptor.stack
        hidden, tokens = model.adaptor.hidden or shape.width, traffic.seconds * traffic.tokens
        length = batch.prompt_tokens + traffic.seconds * 25 / stack + tokens
        one = {
            "encoder": flops.encoder(model.encoder, frames),
            "adaptor": flops.adaptor(stack, width, hidden, shape.width, frames),
            **({"lora": flops.lora(shape, [length])} if shape.adapters else {}),
            "llm": flops.llm(shape, [length]),
            "head": flops.head(shape, tokens + 1),
        }
    again = {
        "encoder": model.encoder.activation_checkpointing and model.encoder.recompute == "all",
        "llm": model.llm.activation_checkpointing and model.llm.recompute == "all",
    }
    again["lora"] = again["llm"]
    parts = {name: part.times(utterances) for name, part in one.items()}
    return flops.step(parts, stage.trains, [name for name, on in again.items() if on])


# -- the whole ---------------------------------------------------------------------------------


def checkpoint_bytes(recipe: Recipe, counted: Mapping[str, Part]) -> float:
    """Of the largest checkpoint: weights of all branches, states of what its stages train."""
    total = 0.0
    for branch in ("pretrain", "sft"):
        names = recipe.parts(branch)
        if recipe.branch in ("both", branch) and any(s.branch == branch for s in recipe.stages):
            total += sum(counted[n].parameters for n in names) * WEIGHT
            total += STATES * max(
                sum(counted[n].parameters for n in s.trains)
                for s in recipe.stages
                if s.branch == branch
            )
    return total


def advice(made: Step, machine: Machine, recipe: Recipe) -> str:
    """What the recipe should change at that size, if anything."""
    if made.peak > machine.memory:
        fixed = sum(made.memory[n] for n in ("weights", "gradients", "optimizer"))
        if fixed > machine.memory / 2:
            return "does not fit: more GPUs, or engine.deepspeed=zero3-offload (or zero3-nvme)"
        over = (
            recipe.model.encoder.activation_checkpointing
            and recipe.model.llm.activation_checkpointing
        )
        return "does not fit: smaller batch.frames" + (
            "" if over else ", or model.….activation_checkpointing=true"
        )
    if made.bottleneck == "storage":
        return "data.dataloader.source.cache_gb: keep the shards on the nodes' own disks"
    if made.bottleneck == "products":
        # **Ours**: beyond this a step's gradient is clean, and more audio in it is wasted.
        much = made.audio_hours > 32
        return "smaller batch.frames, or fewer steps at higher rates" if much else ""
    if machine.nodes > 1 and made.bottleneck == "network":
        return f"gather inside a node: zero_hpz_partition_size {machine.gpus}; or larger batches"
    return "larger batch.frames (fewer, longer steps), or fewer GPUs"


def layouts(machine: Machine, most: int = 1024) -> list[Machine]:
    """The same machine at 1, 2, 4 … ``most`` GPUs."""
    found, world = [], 1
    while world <= most:
        gpus = min(world, machine.gpus)
        found.append(replace(machine, nodes=world // gpus, gpus=gpus))
        world *= 2
    return found


def measured_rate(seconds: float = 1.0, size: int = 2048) -> float:
    """TFLOP/s of products on this machine's GPU (bf16), or CPU (fp32)."""
    import time

    gpu = torch.cuda.is_available()
    kind = {"device": "cuda", "dtype": torch.bfloat16} if gpu else {}
    size = size * 4 if gpu else size
    a, b = torch.randn(size, size, **kind), torch.randn(size, size, **kind)
    a @ b
    rounds, started = 0, time.monotonic()
    while (spent := time.monotonic() - started) < seconds:
        a @ b
        if gpu:
            torch.cuda.synchronize()
        rounds += 1
    return rounds * 2 * size**3 / spent / 1e12
