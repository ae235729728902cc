"""Memory of a GPU, or of a rank on a CPU, in a training step, by part.

ZeRO-3's shares are counted exactly, and so are its buffers, which DeepSpeed's settings size. What
layers save for the backward pass was counted by autograd's hooks on layers of several widths. How
far the sum is from what a run takes, ``tools/bench/memory.py`` measures (tools/experiments/LOG.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dsasr.engine.config import read_ds_config

if TYPE_CHECKING:
    from dsasr.planning.cluster_sizing import Machine, Part
    from dsasr.recipe import Recipe
    from dsasr.stages import StageConfig

GB = 1e9
WEIGHT, GRADIENT, STATES = 2, 2, 12  # bytes a parameter in bf16: itself, its gradient, fp32 states
FRAMES = 100  # a second of audio in feature frames
# What is there between steps too.
HELD = ("weights", "gradients", "optimizer", "bucket", "offloaded", "reserve", "heap")
# DeepSpeed's defaults, in elements: gradients are gathered in a bucket until it is full; a gathered
# weight is kept where its next use is near, so that the last ones of the forward pass are still
# there for the backward pass; and so many are gathered ahead.
BUCKET, REUSE, PREFETCH = 500_000_000, 1_000_000_000, 50_000_000
# What a CPU rank holds beside that (**ours**, fitted to measured runs): libraries' own buffers, in
# GB and as a share; and a share of what comes and goes in a step, for the heap's holes.
BUFFERS, BUFFERS_SHARE, HOLES = 0.04, 0.02, 0.1


def memory(
    recipe: Recipe,
    stage: StageConfig,
    machine: Machine,
    counted: Mapping[str, Part],
    at: Mapping[str, float],
    used: list[str],
) -> dict[str, float]:
    """GB by part, at the step's fullest moment: the backward pass of a large batch.

    ``at``: positions of each part, and seconds of audio; ``used``: parts of the stage's branch.
    """
    world, gb = machine.world, {}
    wide = 2 if _float32(recipe, machine) else 1  # times the bytes in bf16
    zero = read_ds_config(recipe.engine.deepspeed).get("zero_optimization", {})
    away = (zero.get("offload_optimizer") or {}).get("device") in ("cpu", "nvme")
    held = used if recipe.branch != "both" else [*recipe.parts("pretrain"), *recipe.parts("sft")]
    gb["weights"] = sum(counted[n].parameters for n in held) * WEIGHT * wide / world
    trained = sum(counted[n].parameters for n in stage.trains)
    if machine.cpu or not away:
        gb["gradients"] = trained * GRADIENT * wide / world
        gb["optimizer"] = trained * STATES / world
        if recipe.branch == "both" and recipe.engine.offload.device not in ("cpu", "disk"):
            gb["offloaded"] = _trained_beside(recipe, stage, counted) * STATES / world
    bucket = int(zero.get("reduce_bucket_size", BUCKET))
    filled = min(trained, bucket) * GRADIENT * wide
    # It is there whole; on a CPU only what is touched takes memory.
    gb["bucket"] = filled if machine.cpu else bucket * GRADIENT * wide
    # What is in it is copied for the collective; gloo copies it again.
    gb["reducing"] = filled * (2 if machine.cpu else 1)
    gb["gathered"] = _gathered(stage, zero, counted, used) * WEIGHT * wide
    saved = [activations(recipe, stage, machine, n, counted[n], at[n], at["length"]) for n in used]
    gb["activations"] = sum(saved)
    gb["features"] = at["seconds"] * FRAMES * recipe.model.encoder.mels * 4 * 2
    gb = {name: value / GB for name, value in gb.items()}
    gb["reserve"] = machine.reserve
    if machine.cpu:
        there = sum(value for name, value in gb.items() if name in HELD)
        gb["holes"] = HOLES * (sum(gb.values()) - there)
        gb["heap"] = BUFFERS + BUFFERS_SHARE * there
    return gb


def _float32(recipe: Recipe, machine: Machine) -> bool:
    """Whether weights and activations are float32, twice as wide as bf16."""
    chosen = recipe.engine.precision
    return chosen == "fp32" or (chosen == "auto" and machine.cpu)


def _trained_beside(recipe: Recipe, stage: StageConfig, counted: Mapping[str, Part]) -> int:
    """The most parameters that a stage of the other branch trains."""
    other = "sft" if stage.branch == "pretrain" else "pretrain"
    stages = (s for s in recipe.stages if s.branch == other)
    return max((sum(counted[n].parameters for n in s.trains) for s in stages), default=0)


def _gathered(
    stage: StageConfig, zero: Mapping[str, Any], counted: Mapping[str, Part], used: list[str]
) -> float:
    """The most parameters that ZeRO-3 holds gathered: those of the end of the forward pass that the
    backward pass is to use soon, one piece in use, and what is fetched ahead."""
    near = int(zero.get("stage3_max_reuse_distance", REUSE)) / 2  # there and back
    ahead = int(zero.get("stage3_prefetch_bucket_size", PREFETCH))
    behind = sum(counted[n].parameters for n in used if reached(stage, n))
    wanted = min(behind, near) + ahead + max(counted[n].largest for n in used)
    most = int(zero.get("stage3_max_live_parameters", REUSE))
    return min(sum(counted[n].parameters for n in used), wanted, most)


def reached(stage: StageConfig, part: str) -> bool:
    """Whether the backward pass reaches that part."""
    place = {"encoder": 0, "ctc": 1, "adaptor": 1, "llm": 2, "lora": 2}
    return place[part] >= min(place[p] for p in stage.trains)


def activations(
    recipe: Recipe,
    stage: StageConfig,
    machine: Machine,
    name: str,
    part: Part,
    count: float,
    length: float,
) -> float:
    """Bytes kept of ``count`` positions for the backward pass of a part, or used by one layer of it
    where there is no backward pass. ``length``: encoder frames of an utterance."""
    model, float32 = recipe.model, _float32(recipe, machine)
    size = 4 if float32 else 2
    if name == "encoder":
        config = model.encoder
        mels = (config.mels - 1) // 2, ((config.mels - 1) // 2 - 1) // 2
        # Two convolutions' inputs and outputs, the first at twice the frame rate.
        front = (2 * mels[0] + mels[1]) * config.subsample_channels + 4 * config.mels
        # Masks of dropout: bytes on a GPU, values on a CPU.
        masks = (4 if machine.cpu else 4 / size) if config.dropout else 0
        layer = (19 + masks) * config.width + 4 * config.ffn
        if machine.cpu and length <= 512:
            layer += config.heads * length  # plain attention, which keeps its shares
        kept, checkpoint, cheap = (
            config.width,
            config.activation_checkpointing,
            config.recompute == "cheap",
        )
    elif name == "llm":
        layer = (part.saved + (0.0 if float32 else part.upcast)) / part.layers
        front, kept = 0.0, part.shape.width
        checkpoint, cheap = model.llm.activation_checkpointing, model.llm.recompute == "cheap"
    elif name == "lora":
        saved, checkpoint = count * part.saved * size, model.llm.activation_checkpointing
        if "lora" not in stage.trains:
            return 0.0  # the gradient passes through frozen products without what they were given
        whole = not checkpoint or model.llm.recompute == "cheap"
        return saved if whole else saved / part.layers
    else:
        return count * 4 * model.encoder.width * 2 * size
    if not reached(stage, name):
        return count * layer * size
    kept = layer / 2 if cheap else kept  # products' results are about half of what a layer saves
    layers = kept * part.layers + layer if checkpoint else layer * part.layers
    return count * (front + layers) * size
