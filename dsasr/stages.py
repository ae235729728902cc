"""Settings of the stage table: what a stage trains, when encoders are published, learning rates.

No tensor is needed here. `dsasr.schedule` says which stage steps next.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from dsasr.config import nearest
from dsasr.data.dataloader.bucketing import BatchConfig
from dsasr.utils import ranges
from dsasr.utils.errors import UserError
from dsasr.utils.names import check_name
from dsasr.utils.ranges import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    PositiveShare,
    Range,
    Share,
)

BranchName = Literal["pretrain", "sft"]
PARTS: dict[str, tuple[str, ...]] = {
    # encoder_lora, lora: if the recipe has model.encoder_lora, model.lora; layer_sum: if it has
    # model.encoder.layer_sum
    "pretrain": ("encoder", "encoder_lora", "layer_sum", "ctc"),
    # ctc: of an adaptor that reads it
    "sft": ("encoder", "encoder_lora", "layer_sum", "ctc", "adaptor", "llm", "lora"),
}
ENCODER_PARTS = frozenset({"encoder", "encoder_lora", "layer_sum"})  # what its output depends on
OBJECTIVES = {"pretrain": ("cr_ctc", "ctc"), "sft": ("ce",)}


@dataclass(frozen=True)
class StageConfig:
    """One row of the stage table.

    ``trains`` maps the parts that this stage trains to their maximum learning rates: one optimizer
    parameter group each. All other parts are frozen. ``lora`` is the LoRA matrices in the language
    model (`model.lora`), ``llm`` the model's own weights; so with ``encoder_lora`` and ``encoder``.
    ``layer_sum`` is the weights of the sum over a pretrained encoder's blocks, which ``encoder``
    has too: for a stage that keeps the blocks frozen, or trains LoRA in them.
    """

    name: str  # unique name; key=value reaches the stage by it (stages.NAME.steps=100)
    # pretrain: encoder and CTC head; sft: encoder, adaptor, language model and LoRA
    branch: BranchName
    # part → maximum learning rate, all others are frozen; pretrain: encoder or encoder_lora,
    # layer_sum (with model.encoder.layer_sum; in encoder already), ctc; sft: these (ctc: of an
    # adaptor that reads it), adaptor, llm or lora
    trains: dict[str, NonNegativeFloat]
    steps: PositiveInt  # optimizer steps of the stage
    objective: str = ""  # pretrain: cr_ctc (default) or ctc; sft: ce
    warmup_steps: NonNegativeInt = 0  # steps of linear warmup; below steps
    # shape of the learning rate after warmup
    decay: Literal["cosine", "linear", "constant"] = "cosine"
    min_lr_ratio: Share = 0.0  # learning rate at the end of the decay, as a share of the maximum
    weight_decay: NonNegativeFloat = 0.0  # decoupled weight decay of AdamW
    grad_accum_steps: PositiveInt = 1  # micro-batches of a rank in one optimizer step
    batch: BatchConfig | None = None  # batch budgets of the stage; null: data.dataloader.batch
    # dataset name → weight, the others are left out; null: all with their own weights
    mixture: dict[str, NonNegativeFloat] | None = None
    swaps: bool = False  # load newer encoder snapshots while the stage runs (sft)
    # last steps of the stage that wait for the final encoder (sft)
    steps_after_final_swap: NonNegativeInt = 0
    keep_moments: bool = False  # keep the Adam moments of parts that the stage before trained too
    # share of the micro-batches that have text and no speech (data.text_only); 1: text alone, which
    # needs no encoder (sft)
    text_share: Share = 0.0

    def __post_init__(self) -> None:
        ranges.check(self)
        check_name(self.name, "a stage")
        where = f"stage '{self.name}'"
        for part in self.trains:
            if part not in PARTS[self.branch]:
                raise UserError(
                    f"{where} trains an unknown part '{part}'"
                    f"{nearest(part, PARTS[self.branch])} in branch {self.branch}"
                )
        if not self.trains:
            raise UserError(f"{where} trains nothing: give 'trains' at least one part")
        for matrices, whole in (("lora", "llm"), ("encoder_lora", "encoder")):
            if {matrices, whole} <= set(self.trains):
                raise UserError(
                    f"{where} trains both '{whole}' and '{matrices}': all that LoRA can reach, the "
                    "whole model reaches too; name one of them"
                )
        if {"encoder", "layer_sum"} <= set(self.trains):
            raise UserError(f"{where}: 'encoder' trains 'layer_sum' too; name one of them")
        if self.warmup_steps >= self.steps:
            raise UserError(
                f"{where}: warmup_steps {self.warmup_steps} must be below its {self.steps} steps"
            )
        if self.steps_after_final_swap > self.steps:
            raise UserError(f"{where}: steps_after_final_swap is above its {self.steps} steps")
        if self.steps_after_final_swap and not self.swaps:
            raise UserError(
                f"{where}: steps_after_final_swap counts steps after a swap, and the stage makes "
                "none: give it swaps=true, or leave it out"
            )
        if self.swaps and self.branch != "sft":
            raise UserError(f"{where}: swaps needs a stage in branch sft, which loads encoders")
        if self.min_lr_ratio and self.decay == "constant":
            raise UserError(
                f"{where}: min_lr_ratio has no effect with decay=constant: leave one of them out"
            )
        if self.text_share and self.branch != "sft":
            raise UserError(f"{where}: text_share needs a stage in branch sft")
        if self.text_only and (speech := {*ENCODER_PARTS, "ctc"} & set(self.trains)):
            raise UserError(f"{where}: text alone cannot train '{min(speech)}'; lower text_share")
        if not self.objective:
            object.__setattr__(self, "objective", OBJECTIVES[self.branch][0])
        if self.objective not in OBJECTIVES[self.branch]:
            raise UserError(
                f"{where} has an unknown objective '{self.objective}'"
                f"{nearest(self.objective, OBJECTIVES[self.branch])}"
            )

    @property
    def text_only(self) -> bool:
        """Whether all batches have text and no speech."""
        return self.text_share == 1

    @property
    def trains_encoder(self) -> bool:
        """Whether the stage changes the encoder's output."""
        return not ENCODER_PARTS.isdisjoint(self.trains)

    @property
    def trains_sft_encoder(self) -> bool:
        """Whether the stage trains the sft branch's encoder: later snapshots cannot replace it."""
        return self.branch == "sft" and self.trains_encoder


@dataclass(frozen=True)
class PlannedSwap:
    """A swap at fixed steps: the encoder of pretrain step ``pretrain`` from sft step ``sft`` on.

    ``sft`` counts the sft branch's steps over all its stages; None: as soon as it is published.
    """

    pretrain: PositiveInt  # publish the encoder after this pretrain step, counted from 1
    # load it from this sft step on, counted over all sft stages; null: as soon as it is there
    sft: NonNegativeInt | None = None

    def __post_init__(self) -> None:
        ranges.check(self)


@dataclass(frozen=True)
class DriftConfig:
    """When the encoder is published. Steps are pretrain steps; shares are of their total."""

    # publish a snapshot: cka: when CKA to the last one falls below threshold; fixed: at `swaps`;
    # final: only when pretraining ends
    mode: Literal["cka", "fixed", "final"] = "cka"
    # cka: share of the pretrain steps after which the first reference is taken, 0 to 1
    start: Share = 0.25
    # cka: share of the pretrain steps between two measurements, above 0 to 1
    interval: PositiveShare = 0.005
    # cka: CKA to the reference below which a snapshot is published and becomes the reference
    threshold: Annotated[float, Range(-1, 1)] = 0.975
    swaps: tuple[PlannedSwap, ...] = ()  # fixed: the steps at which to publish and swap
    # cka: utterances of the validation set that CKA is measured on
    probe_utterances: PositiveInt = 32
    layers: bool = False  # cka: also log CKA of every encoder layer
    unbiased: bool = False  # cka: debiased estimate of CKA, for small probe sets

    def __post_init__(self) -> None:
        ranges.check(self)
        if self.mode == "fixed" and not self.swaps:
            raise UserError("drift.mode=fixed needs drift.swaps, a list of {pretrain: step}")
        steps = [s.pretrain for s in self.swaps]
        if steps != sorted(set(steps)):
            raise UserError("drift.swaps must name rising pretrain steps")
        sft_steps = [s.sft for s in self.swaps if s.sft is not None]
        if sft_steps != sorted(sft_steps):
            raise UserError("drift.swaps must name sft steps that do not fall")
        if self.swaps and self.mode != "fixed":
            raise UserError(
                f"drift.swaps has no effect with drift.mode={self.mode}: give drift.mode=fixed"
            )


def learning_rate(stage: StageConfig, part: str, step: int) -> float:
    """The lr of ``part`` at ``step`` (from 0) of the stage: linear warm-up, then the decay."""
    peak = stage.trains[part]
    if step < stage.warmup_steps:
        return peak * (step + 1) / stage.warmup_steps
    decay_steps = stage.steps - stage.warmup_steps
    share = (step - stage.warmup_steps) / max(decay_steps, 1)
    if stage.decay == "cosine":
        shape = 0.5 * (1 + math.cos(math.pi * min(share, 1.0)))
    elif stage.decay == "linear":
        shape = 1 - min(share, 1.0)
    else:
        return peak
    return peak * (stage.min_lr_ratio + (1 - stage.min_lr_ratio) * shape)
