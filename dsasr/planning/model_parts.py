"""Sizes of a recipe's model parts (encoder, ctc, adaptor, llm, lora), counted on the meta device.

No weight is allocated. A language model's shape comes from its ``config.json``, or from the
published shapes of `dsasr.model.llm_hub`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from dsasr.build import Builder
from dsasr.data.text.phonemes import PhonemeVocab
from dsasr.model import lora
from dsasr.model.adaptors.protocol import build_adaptor
from dsasr.model.ctc import CtcHead
from dsasr.model.llm_hub import llm_config
from dsasr.planning.flops import LlmShape
from dsasr.recipe import Recipe

ASSUMED_PHONEMES = 256  # size of the vocabulary where its file is not there yet


@dataclass(frozen=True)
class ModelPart:
    """One of encoder, ctc, adaptor, llm, lora."""

    parameters: int
    layers: int
    largest: int  # parameters of the largest module that ZeRO-3 gathers at once
    shape: LlmShape | None = None  # llm only
    saved: float = 0.0  # llm, lora: values that all layers save for one position's backward pass
    upcast: float = 0.0  # llm: values saved beside them in bf16, where norms save a float32 input


def count_parts(recipe: Recipe) -> dict[str, ModelPart]:
    """All parts of the model. Raises `UserError` where the language model's shape is not known."""
    return {**count_speech_parts(recipe), **count_llm_parts(recipe)}


def count_units(recipe: Recipe) -> int:
    """Units of the CTC head, blank included: of the vocabulary, or `ASSUMED_PHONEMES`."""
    path = Path(recipe.data.phonemes)
    return len(PhonemeVocab.load(path)) if path.is_file() else ASSUMED_PHONEMES


def count_speech_parts(recipe: Recipe) -> dict[str, ModelPart]:
    """Encoder and CTC head; the head for `ASSUMED_PHONEMES` if the vocabulary is not there yet."""
    encoder = Builder(recipe).encoder_shape
    with torch.device("meta"):
        head = CtcHead(encoder.width, count_units(recipe), recipe.model.pretrain.head)
    largest = max(count_parameters(block) for block in encoder.blocks)
    return {
        "encoder": ModelPart(count_parameters(encoder), len(encoder.blocks), largest),
        "ctc": ModelPart(count_parameters(head), 1, count_parameters(head)),
    }


def count_llm_parts(recipe: Recipe) -> dict[str, ModelPart]:
    """Adaptor, language model and, if the recipe has it, LoRA.

    Raises `UserError` where the language model's shape is not known.
    """
    model = recipe.model
    config = llm_config(model.llm.path)
    width = config.get_text_config().hidden_size
    with torch.device("meta"):
        llm = AutoModelForCausalLM.from_config(config)
        encoder_width = Builder(recipe).encoder_shape.width
        adaptor = build_adaptor(model.adaptor, encoder_width, width, units=count_units(recipe))
    shape = LlmShape.of(llm)
    parts = {"adaptor": ModelPart(count_parameters(adaptor), 1, count_parameters(adaptor))}
    if model.lora is not None:
        added = lora.count(llm, model.lora)
        saved = sum(_lora_saves(recipe, m) for m in lora.targeted(llm, model.lora).values())
        parts["lora"] = ModelPart(added, shape.layers, 0, saved=saved)
        shape = replace(shape, adapters=added)
    embedding = llm.get_input_embeddings().weight.numel()
    saves = _llm_saves(config, shape)
    parts["llm"] = ModelPart(count_parameters(llm), shape.layers, embedding, shape, *saves)
    return parts


def count_parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _lora_saves(recipe: Recipe, layer: nn.Linear) -> float:
    """Values that LoRA on ``layer`` saves for one position: A's output; with dropout also A's input
    and a mask of half its bytes; and B's output where products are kept (recompute=cheap)."""
    config, llm = recipe.model.lora, recipe.model.llm
    dropped = 1.5 * layer.in_features if config.dropout else 0.0
    cheap = llm.activation_checkpointing and llm.recompute == "cheap"
    return config.rank + (layer.out_features if cheap else dropped)


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
