"""The FLOPs of a training step's batches by part, for `step.py`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from dsasr.data.batch import Batch
from dsasr.model.adaptors.protocol import build_adaptor
from dsasr.model.ctc import CtcHead
from dsasr.planning import flops
from dsasr.planning.model_parts import (
    SpeechShape,
    adaptor_cost,
    count_speech_parts,
    head_cost,
    planned_encoder,
)
from dsasr.planning.module_cost import ModuleCost
from dsasr.recipe import Recipe
from dsasr.stages import StageConfig

PHONEMES, PHONEME_RATE = 256, 12.0  # vocabulary; spoken in a second


@dataclass(frozen=True)
class SpeechCosts:
    """FLOPs of encoder, CTC head and adaptor by an utterance's length, counted on device meta."""

    shape: SpeechShape
    encoder: ModuleCost
    ctc: ModuleCost
    adaptor: ModuleCost | None
    adapters: int  # weights of LoRA in the encoder

    @classmethod
    def of(cls, cfg: Recipe, llm_width: int = 0) -> SpeechCosts:
        """``llm_width`` 0: without an adaptor."""
        parts, width = count_speech_parts(cfg), planned_encoder(cfg).width
        adaptor = None
        with torch.device("meta"):
            head = CtcHead(width, PHONEMES, cfg.model.pretrain.head)
            if llm_width:
                adaptor = adaptor_cost(build_adaptor(cfg.model.adaptor, width, llm_width), width)
        encoder, matrices = parts["encoder"], parts.get("encoder_lora")
        adapters = matrices.parameters if matrices else 0
        return cls(encoder.speech, encoder.cost, head_cost(head, width), adaptor, adapters)


def total(cost: ModuleCost, lengths: Sequence[int]) -> flops.PartFlops:
    return sum(map(cost.flops, lengths), flops.PartFlops(0.0))


def work(
    cfg: Recipe, stage: StageConfig, module: nn.Module, batch: Batch, costs: SpeechCosts
) -> tuple[dict[str, flops.StepFlops], int]:
    """The FLOPs of a batch by part, and the positions that it has for the branch's main part."""
    model, rows = cfg.model, batch.feature_lengths_B.tolist()
    frames = [costs.shape.frames(n) for n in rows]
    again = {"encoder": model.encoder.activation_checkpointing and model.encoder.recompute == "all"}
    again["encoder_lora"] = again["encoder"]
    views = 2 if stage.branch == "pretrain" and model.pretrain.consistency else 1
    parts = {"encoder": total(costs.encoder, rows).times(views)}
    if costs.adapters:
        parts["encoder_lora"] = flops.encoder_lora(costs.adapters, frames).times(views)
    if stage.branch == "pretrain":
        parts["ctc"] = total(costs.ctc, frames).times(views)
        positions = views * sum(frames)
    else:
        shape = flops.LlmShape.of(module.llm)
        fixed = len(module.plain.prefix) + len(module.plain.suffix) - 1  # the end token is no input
        speech = module.adaptor.output_lengths(torch.tensor(frames))
        lengths = (speech + batch.token_lengths_B + fixed).tolist()
        parts |= {
            "adaptor": total(costs.adaptor, frames),
            **({"lora": flops.lora(shape, lengths)} if shape.adapters else {}),
            "llm": flops.llm(shape, lengths),
            "head": flops.head(shape, int(batch.token_lengths_B.sum())),
        }
        positions = sum(lengths)
        again["llm"] = again["lora"] = (
            model.llm.activation_checkpointing and model.llm.recompute == "all"
        )
    recomputed = [name for name, on in again.items() if on]
    return flops.step_flops(parts, stage.trains, recomputed), positions
