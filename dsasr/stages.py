"""The stage table and the schedule: which branch steps next, what it trains, on which encoder.

No tensor is needed here. `Schedule.next_turn` maps the progress of both branches, published
snapshots included, to the next turn; `learning_rate` maps a stage's step to its learning rate. Both
are pure functions, so that a whole run can be printed, and tested, before it is trained
(``dsasr timeline``).

Two branches share a run. The *pretrain* branch trains the live encoder and its CTC head; the *sft*
branch trains adaptor and LLM (in the joint stage, the encoder too) on a snapshot of that encoder.
The sft branch starts with the first published snapshot, loads later ones by hot-swap where its
stage allows it, and gets the final encoder when pretraining ends.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
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
    # encoder_lora, lora: if the recipe has model.encoder_lora, model.lora
    "pretrain": ("encoder", "encoder_lora", "ctc"),
    # ctc: of an adaptor that reads it
    "sft": ("encoder", "encoder_lora", "ctc", "adaptor", "llm", "lora"),
}
OBJECTIVES = {"pretrain": ("cr_ctc", "ctc"), "sft": ("ce",)}


@dataclass(frozen=True)
class StageConfig:
    """One row of the stage table.

    ``trains`` maps the parts that this stage trains to their maximum learning rates: one optimizer
    parameter group each. All other parts are frozen. ``lora`` is the LoRA matrices in the language
    model (`model.lora`), ``llm`` the model's own weights; so with ``encoder_lora`` and ``encoder``.
    """

    name: str  # unique name; key=value reaches the stage by it (stages.NAME.steps=100)
    # pretrain: encoder and CTC head; sft: encoder, adaptor, language model and LoRA
    branch: BranchName
    # part → maximum learning rate, all others are frozen; pretrain: encoder or encoder_lora, ctc;
    # sft: encoder or encoder_lora, ctc (of an adaptor that reads it), adaptor, llm or lora
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
        if self.text_share and self.branch != "sft":
            raise UserError(f"{where}: text_share needs a stage in branch sft")
        if self.text_only and (speech := {"encoder", "encoder_lora", "ctc"} & set(self.trains)):
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
        """Whether the stage changes the encoder's output, by its own weights or LoRA's."""
        return not {"encoder", "encoder_lora"}.isdisjoint(self.trains)

    @property
    def needs_final_encoder(self) -> bool:
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


@dataclass(frozen=True)
class Snapshot:
    """An encoder that pretraining has published for the sft branch."""

    id: str
    pretrain: int  # pretrain steps done when it was published
    cause: str  # drift, fixed, final, or given (an encoder from outside)


@dataclass(frozen=True)
class Progress:
    """The steps done and snapshots published in a run; part of every checkpoint."""

    pretrain: int = 0  # steps done in the pretrain branch
    stage: int = 0  # position in the sft branch's list of stages
    step: int = 0  # steps done in that stage
    sft: int = 0  # steps done in the sft branch over all its stages
    sft_since: int = 0  # pretrain steps done when the sft branch started
    published: tuple[Snapshot, ...] = ()
    in_use: str | None = None  # id of the snapshot in the sft branch

    @property
    def steps(self) -> int:
        """Optimizer steps done, over both branches."""
        return self.pretrain + self.sft


@dataclass(frozen=True)
class Turn:
    """What the training loop does next: one step of a branch, a wait for an encoder, or the end."""

    kind: Literal["step", "wait", "end"]
    stage: StageConfig | None = None
    step: int = 0  # the stage's next step, from 0
    load: Snapshot | None = None  # the encoder that the sft branch loads before the step


@dataclass(frozen=True)
class Schedule:
    """The stage table, and which turn comes next in it.

    ``interleave`` (pretrain steps, sft steps) is the ratio in which the branches take turns in a
    colocated run. ``branch`` restricts a job of a concurrent run to one branch.
    """

    stages: tuple[StageConfig, ...]
    drift: DriftConfig = field(default_factory=DriftConfig)
    interleave: tuple[int, int] = (1, 1)
    branch: Literal["both", "pretrain", "sft"] = "both"

    def __post_init__(self) -> None:
        names = [s.name for s in self.stages]
        if not names:
            raise UserError("the recipe has no stages")
        for name in names:
            if names.count(name) > 1:
                raise UserError(f"two stages are called '{name}': names must differ")
        if len({s.objective for s in self.pretrain}) > 1:
            raise UserError("the stages of branch pretrain must have one objective")
        if min(self.interleave) < 1:
            raise UserError("interleave needs two whole numbers ≥ 1: pretrain steps, sft steps")
        if self.branch == "pretrain" and not self.pretrain:
            raise UserError("branch=pretrain, but the recipe has no stage of branch pretrain")
        late = [s.pretrain for s in self.drift.swaps if s.pretrain > self.pretrain_steps()]
        if self.drift.mode == "fixed" and self.pretrain and late:
            raise UserError(
                f"drift.swaps wants the encoder of pretrain step {late[0]:,}, but pretraining has "
                f"{self.pretrain_steps():,} steps"
            )
        sft_steps = sum(s.steps for s in self.sft)
        beyond = [s.sft for s in self.drift.swaps if s.sft is not None and s.sft >= sft_steps]
        if self.drift.mode == "fixed" and self.sft and beyond:
            raise UserError(
                f"drift.swaps loads an encoder from sft step {beyond[0]:,} on, but the sft stages "
                f"have {sft_steps:,} steps"
            )
        if self.branch == "sft" and not self.sft:
            raise UserError("branch=sft, but the recipe has no stage of branch sft")

    @property
    def pretrain(self) -> tuple[StageConfig, ...]:
        return tuple(s for s in self.stages if s.branch == "pretrain")

    @property
    def sft(self) -> tuple[StageConfig, ...]:
        return tuple(s for s in self.stages if s.branch == "sft")

    def pretrain_steps(self) -> int:
        return sum(s.steps for s in self.pretrain)

    def pretrain_stage(self, step: int) -> tuple[StageConfig, int]:
        """The stage of pretrain step ``step`` (from 0), and the step within it."""
        for stage in self.pretrain:
            if step < stage.steps:
                return stage, step
            step -= stage.steps
        raise ValueError("pretraining has fewer steps")

    def drift_steps(self) -> tuple[int, int]:
        """(pretrain step of the first drift reference, pretrain steps between measurements)."""
        total = self.pretrain_steps()
        return max(1, round(self.drift.start * total)), max(1, round(self.drift.interval * total))

    def measures_at(self, pretrain: int) -> Literal["reference", "measure"] | None:
        """What the drift monitor does after pretrain step ``pretrain`` (from 1)."""
        if self.drift.mode != "cka" or not self.pretrain:
            return None
        first, interval = self.drift_steps()
        if pretrain == first:
            return "reference"
        if pretrain > first and (pretrain - first) % interval == 0:
            return "measure"
        return None

    def publishes_at(self, pretrain: int) -> str | None:
        """Why the encoder is published after this pretrain step whatever its drift, if it is."""
        if not self.pretrain:
            return None
        if pretrain == self.pretrain_steps():
            return "final"
        fixed = self.drift.mode == "fixed" and any(s.pretrain == pretrain for s in self.drift.swaps)
        return "fixed" if fixed else None

    def finished_pretraining(self, progress: Progress) -> bool:
        """Whether the final encoder is published, by this job or the other one."""
        return not self.pretrain or any(s.cause == "final" for s in progress.published)

    def next_turn(self, progress: Progress) -> Turn:
        """The turn that follows ``progress``; a pure function."""
        sft = self._sft_turn(progress) if self.branch != "pretrain" else Turn("end")
        pretrain = self._pretrain_turn(progress) if self.branch != "sft" else Turn("end")
        if sft.kind == "step" and pretrain.kind == "step":
            p, s = self.interleave
            due = (progress.pretrain - progress.sft_since) * s < progress.sft * p
            return pretrain if due else sft
        if sft.kind == "step" or pretrain.kind == "end":
            return sft
        return pretrain

    def _pretrain_turn(self, progress: Progress) -> Turn:
        if progress.pretrain >= self.pretrain_steps():
            return Turn("end")
        return Turn("step", *self.pretrain_stage(progress.pretrain))

    def _sft_turn(self, progress: Progress) -> Turn:
        stages = self.sft
        if progress.stage >= len(stages):
            return Turn("end")
        stage, step = stages[progress.stage], progress.step
        if stage.text_only:
            return Turn("step", stage, step)
        final = self.finished_pretraining(progress)
        waits_for_final = stage.needs_final_encoder or (
            stage.steps_after_final_swap and step >= stage.steps - stage.steps_after_final_swap
        )
        if waits_for_final and not final:
            return Turn("wait", stage, step)
        # An encoder that the sft branch itself has trained is never replaced.
        trained_here = any(s.needs_final_encoder for s in stages[: progress.stage]) or (
            stage.needs_final_encoder and step > 0
        )
        if trained_here:
            return Turn("step", stage, step)
        due = progress.published[-1] if stage.needs_final_encoder else self._due(progress)
        if due is None:
            return Turn("wait", stage, step)
        may_swap = stage.swaps or stage.needs_final_encoder or progress.in_use is None
        if may_swap and due.id != progress.in_use:
            return Turn("step", stage, step, load=due)
        return Turn("step", stage, step)

    def _due(self, progress: Progress) -> Snapshot | None:
        """The snapshot that the sft branch should use: the newest, or the one planned for its step.

        None where it is not published yet.
        """
        snapshots = progress.published
        if self.drift.mode == "fixed" and any(s.sft is not None for s in self.drift.swaps):
            planned = [s for s in self.drift.swaps if s.sft is None or s.sft <= progress.sft]
            if not planned:  # before the first planned swap
                return snapshots[0] if snapshots else None
            step = planned[-1].pretrain
            if not any(s.pretrain == step for s in snapshots):
                return None
            snapshots = tuple(s for s in snapshots if s.pretrain <= step)
        return snapshots[-1] if snapshots else None

    def needed(self, progress: Progress) -> set[str]:
        """Ids of the published snapshots that the sft branch may load from here on."""
        ids = {s.id for s in progress.published[-1:]}
        if self.drift.mode == "fixed":
            now = [s for s in self.drift.swaps if s.sft is None or s.sft <= progress.sft]
            later = [s for s in self.drift.swaps if s.sft is not None and s.sft > progress.sft]
            steps = {swap.pretrain for swap in (*now[-1:], *later)}
            first = progress.published[:1] if not now else ()
            ids |= {s.id for s in progress.published if s.pretrain in steps or s in first}
        return ids

    def advance(self, progress: Progress, turn: Turn) -> Progress:
        """Progress after the step of ``turn``."""
        assert turn.kind == "step" and turn.stage is not None
        if turn.stage.branch == "pretrain":
            return replace(progress, pretrain=progress.pretrain + 1)
        progress = replace(
            progress,
            step=progress.step + 1,
            sft=progress.sft + 1,
            sft_since=progress.sft_since if progress.sft else progress.pretrain,
            in_use=turn.load.id if turn.load else progress.in_use,
        )
        if progress.step >= turn.stage.steps:
            progress = replace(progress, stage=progress.stage + 1, step=0)
        return progress


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


def add_published(progress: Progress, snapshots: Sequence[Snapshot]) -> Progress:
    """``progress`` with ``snapshots`` added; those with an id that it has already are skipped."""
    known = {s.id for s in progress.published}
    new = tuple(s for s in snapshots if s.id not in known)
    return replace(progress, published=progress.published + new) if new else progress
