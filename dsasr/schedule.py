"""The schedule: which branch steps next, in which stage, on which encoder.

No tensor is needed here. `Schedule.next_turn` maps the progress of both branches, published
snapshots included, to the next turn. It is a pure function, so that a whole run can be printed, and
tested, before it is trained (``dsasr timeline``).

Two branches share a run. The *pretrain* branch trains the live encoder and its CTC head; the *sft*
branch trains adaptor and LLM (in the joint stage, the encoder too) on a snapshot of that encoder.
The sft branch starts with the first published snapshot, loads later ones by hot-swap where its
stage allows it, and gets the final encoder when pretraining ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from dsasr.stages import DriftConfig, StageConfig
from dsasr.utils.errors import UserError

GIVEN = "given"  # id and cause of an encoder from outside the run, which it starts with


@dataclass(frozen=True)
class Snapshot:
    """An encoder that pretraining has published for the sft branch."""

    id: str
    pretrain: int  # pretrain steps done when it was published
    cause: str  # drift, fixed, final, or `GIVEN`


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
            behind = (progress.pretrain - progress.sft_since) * s < progress.sft * p
            return pretrain if behind else sft
        if sft.kind == "step" or pretrain.kind == "end":
            return sft
        return pretrain

    def _pretrain_turn(self, progress: Progress) -> Turn:
        if progress.pretrain >= self.pretrain_steps():
            return Turn("end")
        return Turn("step", *self.pretrain_stage(progress.pretrain))

    def _sft_turn(self, progress: Progress) -> Turn:
        if progress.stage >= len(self.sft):
            return Turn("end")
        stage, step = self.sft[progress.stage], progress.step
        if stage.text_only:
            return Turn("step", stage, step)
        if self._waits_for_final(stage, step) and not self.finished_pretraining(progress):
            return Turn("wait", stage, step)
        if self._has_trained_encoder(progress):  # by the sft branch itself: never replaced
            return Turn("step", stage, step)
        newest = stage.trains_sft_encoder
        snapshot = progress.published[-1] if newest else self._planned_or_newest(progress)
        if snapshot is None:
            return Turn("wait", stage, step)
        may_swap = stage.swaps or stage.trains_sft_encoder or progress.in_use is None
        swaps = may_swap and snapshot.id != progress.in_use
        return Turn("step", stage, step, load=snapshot if swaps else None)

    def _waits_for_final(self, stage: StageConfig, step: int) -> bool:
        """Whether this step of an sft stage is taken on the final encoder alone."""
        last = stage.steps_after_final_swap
        return stage.trains_sft_encoder or (last > 0 and step >= stage.steps - last)

    def _has_trained_encoder(self, progress: Progress) -> bool:
        """Whether the sft branch has trained its encoder, in a stage before or in this one."""
        stage = self.sft[progress.stage]
        before = any(s.trains_sft_encoder for s in self.sft[: progress.stage])
        return before or (stage.trains_sft_encoder and progress.step > 0)

    def _planned_or_newest(self, progress: Progress) -> Snapshot | None:
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


def add_published(progress: Progress, snapshots: Sequence[Snapshot]) -> Progress:
    """``progress`` with ``snapshots`` added; those with an id that it has already are skipped."""
    known = {s.id for s in progress.published}
    new = tuple(s for s in snapshots if s.id not in known)
    return replace(progress, published=progress.published + new) if new else progress
