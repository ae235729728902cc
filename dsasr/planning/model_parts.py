"""Sizes of a recipe's model parts (encoder, encoder_lora, ctc, adaptor, llm, lora), counted on the
meta device.

No weight is allocated and no network is used. A model's shape comes from its ``config.json``, or
from the published shapes of `dsasr.model.llm_hub` and `dsasr.model.encoders.published`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from dsasr.data.dataloader.bucketing import FRAMES_PER_SECOND
from dsasr.data.text.phoneme_vocab import PhonemeVocab
from dsasr.model import lora
from dsasr.model.adaptors.protocol import Adaptor, build_adaptor
from dsasr.model.ctc import CtcHead
from dsasr.model.encoders import published
from dsasr.model.encoders.conformer import Encoder as Conformer
from dsasr.model.encoders.protocol import Encoder
from dsasr.model.llm_hub import config_folder, llm_config
from dsasr.model.lora import LoraConfig
from dsasr.planning.flops import LlmShape
from dsasr.planning.module_cost import ModuleCost
from dsasr.recipe import Recipe

ASSUMED_PHONEMES = 256  # size of the vocabulary where its file is not there yet
# Units that CTC writes in a second, where each is a speech token (**ours**, English phonemes).
ASSUMED_UNITS_PER_SECOND = 12.0


@dataclass(frozen=True)
class ModelPart:
    """One of encoder, encoder_lora, layer_sum, ctc, adaptor, llm, lora."""

    parameters: int
    layers: int
    largest: int  # parameters of the largest module that ZeRO-3 gathers at once
    shape: LlmShape | None = None  # llm only
    # llm, lora, encoder_lora, layer_sum: values saved by all layers for a position's backward pass
    saved: float = 0.0
    upcast: float = 0.0  # llm: values saved beside them in bf16, where norms save a float32 input
    # encoder, ctc, adaptor: FLOPs and saved activations of one utterance
    cost: ModuleCost | None = field(default=None, compare=False)
    speech: SpeechShape | None = field(default=None, compare=False)  # encoder only


@dataclass(frozen=True)
class SpeechShape:
    """From seconds of audio to rows of features and frames of the encoder."""

    encoder: Encoder  # on the meta device

    @property
    def width(self) -> int:
        return self.encoder.width

    @property
    def bins(self) -> int:
        return self.encoder.bins

    def rows(self, seconds: float) -> int:
        """Feature rows T of an utterance."""
        front_end = self.encoder.front_end
        if front_end is None:
            return round(seconds * FRAMES_PER_SECOND)
        return front_end.frames(round(seconds * front_end.rate))

    def frames(self, rows: int) -> int:
        """Encoder frames S of an utterance of ``rows`` T."""
        return int(self.encoder.output_lengths(torch.tensor(rows)))


def count_parts(recipe: Recipe) -> dict[str, ModelPart]:
    """All parts of the model. Raises `UserError` where a model's shape is not known."""
    return {**count_speech_parts(recipe), **count_llm_parts(recipe)}


def used_parts(recipe: Recipe) -> list[str]:
    """Names of the parts that the recipe's stages run."""
    branches = {s.branch: None for s in recipe.stages if recipe.branch in ("both", s.branch)}
    return list(dict.fromkeys(part for branch in branches for part in recipe.parts(branch)))


def assumptions(recipe: Recipe) -> Iterator[str]:
    """What a plan takes for granted where the recipe's files are not there yet, a line each."""
    used, model = used_parts(recipe), recipe.model
    pretrained = recipe.pretrained_encoder
    if pretrained is not None and published.is_published(pretrained.path):
        yield f"shape of {pretrained.path}: as published, as its config.json is not here"
    if "llm" in used and config_folder(model.llm.path) is None:
        yield f"shape of {model.llm.path}: as published, as its config.json is not here"
    if "ctc" in used and not Path(recipe.data.phonemes).is_file():
        yield f"CTC head: for {ASSUMED_PHONEMES} phonemes, as data.phonemes is not there"
    if "adaptor" in used and model.adaptor.frames_per_token is None:
        yield f"speech tokens: {ASSUMED_UNITS_PER_SECOND:g} a second, one for each unit of CTC"
    if any(stage.text_share for stage in recipe.stages):
        yield "text-only batches count as batches with speech"


def count_units(recipe: Recipe) -> int:
    """Units of the CTC head, blank included: of the vocabulary, or `ASSUMED_PHONEMES`."""
    path = Path(recipe.data.phonemes)
    return len(PhonemeVocab.load(path)) if path.is_file() else ASSUMED_PHONEMES


def planned_encoder(recipe: Recipe, **changes: Any) -> Encoder:
    """The recipe's encoder on the meta device, with ``changes`` of its settings.

    Raises `UserError` where its shape is not known.
    """
    with torch.device("meta"):
        return fresh_encoder(recipe, **changes)


def fresh_encoder(recipe: Recipe, **changes: Any) -> Encoder:
    """As `planned_encoder`, with weights of no meaning on torch's default device."""
    cfg = replace(recipe.model.encoder, **changes)
    pretrained = recipe.pretrained_encoder is not None
    return published.fresh_encoder(cfg) if pretrained else Conformer(cfg)


def encoder_cost(short: Encoder, blocks: int) -> ModuleCost:
    """FLOPs and saved activations of an encoder of ``blocks`` blocks, by feature rows of an
    utterance; ``short``: with the first two of them at most, on the meta device."""

    def inputs(rows: int) -> tuple[torch.Tensor, ...]:
        features = torch.empty(1, rows, short.bins, device="meta")
        return features, torch.tensor([rows], device="meta")

    return ModuleCost(short, inputs, short.blocks, blocks)


def head_cost(head: CtcHead, width: int) -> ModuleCost:
    """FLOPs and saved activations of the CTC head, by encoder frames of an utterance."""

    def inputs(frames: int) -> tuple[torch.Tensor, ...]:
        dtype = head.project.weight.dtype
        frames_BSE = torch.empty(1, frames, width, device="meta", dtype=dtype)
        return frames_BSE, torch.tensor([frames], device="meta")

    return ModuleCost(head, inputs)


def adaptor_cost(adaptor: Adaptor, width: int) -> ModuleCost:
    """FLOPs and saved activations of the adaptor, by what it reads of an utterance: encoder frames,
    or units that CTC writes."""

    def inputs(frames: int) -> tuple[torch.Tensor, ...]:
        dtype = next(adaptor.parameters()).dtype
        frames_BSE = torch.empty(1, frames, width, device="meta", dtype=dtype)
        return frames_BSE, torch.tensor([frames], device="cpu")

    return ModuleCost(adaptor, inputs)


def count_speech_parts(recipe: Recipe) -> dict[str, ModelPart]:
    """Encoder, its LoRA if the recipe has it, and CTC head; the head for `ASSUMED_PHONEMES` if the
    vocabulary is not there yet.

    Raises `UserError` where the encoder's shape is not known.
    """
    encoder, model = planned_encoder(recipe), recipe.model
    with torch.device("meta"):
        head = CtcHead(encoder.width, count_units(recipe), model.pretrain.head)
    layers, size = len(encoder.blocks), count_parameters(head)
    changes = {"layers": min(2, layers), "activation_checkpointing": False}
    if recipe.pretrained_encoder is not None:
        changes["layer_sum"] = False
    short = planned_encoder(recipe, **changes)
    parts = {
        "encoder": ModelPart(
            count_parameters(encoder),
            layers,
            largest=max(map(count_parameters, encoder.blocks)),
            cost=encoder_cost(short, layers),
            speech=SpeechShape(encoder),
        )
    }
    if model.encoder_lora is not None:
        parts["encoder_lora"] = _lora_part(encoder, model.encoder_lora, model.encoder, layers)
    if recipe.has_layer_sum:
        parts["layer_sum"] = ModelPart(layers, 1, layers, saved=layers * encoder.width)
    return parts | {"ctc": ModelPart(size, 1, size, cost=head_cost(head, encoder.width))}


def count_llm_parts(recipe: Recipe) -> dict[str, ModelPart]:
    """Adaptor, language model and, if the recipe has it, LoRA.

    Raises `UserError` where a model's shape is not known.
    """
    model = recipe.model
    config = llm_config(model.llm.path)
    width, units = config.get_text_config().hidden_size, count_units(recipe)
    encoder_width = planned_encoder(recipe).width
    with torch.device("meta"):
        llm = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        adaptor = build_adaptor(model.adaptor, encoder_width, width, units=units)
    reads = encoder_width
    if model.adaptor.reads_ctc:
        reads = units + (encoder_width if model.adaptor.frames else 0)
    size = count_parameters(adaptor)
    parts = {"adaptor": ModelPart(size, 1, size, cost=adaptor_cost(adaptor, reads))}
    shape = LlmShape.of(llm)
    if model.lora is not None:
        parts["lora"] = _lora_part(llm, model.lora, model.llm, shape.layers)
        shape = replace(shape, adapters=parts["lora"].parameters)
    embedding = llm.get_input_embeddings().weight.numel()
    saves = _llm_saves(config, shape)
    parts["llm"] = ModelPart(count_parameters(llm), shape.layers, embedding, shape, *saves)
    return parts


def count_parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _lora_part(model: Any, cfg: LoraConfig, settings: Any, layers: int) -> ModelPart:
    """LoRA in ``model``, an encoder or a language model of ``settings``."""
    saved = sum(_lora_saves(cfg, settings, m) for m in lora.targeted(model, cfg).values())
    return ModelPart(lora.count(model, cfg), layers, 0, saved=saved)


def _lora_saves(cfg: LoraConfig, settings: Any, layer: nn.Linear) -> float:
    """Values that LoRA on ``layer`` saves for one position: A's output; with dropout also A's input
    and a mask of half its bytes; and B's output where products are kept (recompute=cheap)."""
    dropped = 1.5 * layer.in_features if cfg.dropout else 0.0
    cheap = settings.activation_checkpointing and settings.recompute == "cheap"
    return cfg.rank + (layer.out_features if cheap else dropped)


def _llm_saves(config: Any, shape: LlmShape) -> tuple[float, float]:
    """(values that all layers save for one position, values saved beside them in bf16).

    Counted on Qwen3 by autograd's hooks, without dropout and with fused attention.
    """
    text, width = config.get_text_config(), shape.width
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    attention = shape.attention_width * (1 + heads / text.num_attention_heads)
    ffn = getattr(text, "intermediate_size", None) or 4 * width
    saved = 6 * width + 4 * attention + 4 * ffn
    return shape.layers * saved, shape.layers * (2 * width + attention)
