"""Where a run is in a stage table that was changed since its checkpoint (``allow_changed``).

A position is a stage's name and the steps done in it, not its place in the table: stages that are
finished may leave it, one that is not trained yet may be longer, shorter or another one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from dsasr import config
from dsasr.schedule import Progress, Schedule
from dsasr.stages import StageConfig
from dsasr.utils.errors import UserError


def progress_in(manifest: Mapping[str, Any], schedule: Schedule) -> Progress:
    """The progress of a checkpoint (its ``manifest``), as a position in ``schedule``.

    Raises `UserError` where the two stage tables have no common position.
    """
    progress = config.build(Progress, manifest["progress"], "progress")
    rows = manifest["recipe"]["stages"]
    before = [(row["name"], row["branch"], row["steps"]) for row in rows]
    if before == [(stage.name, stage.branch, stage.steps) for stage in schedule.stages]:
        return progress
    branches = {name: branch for name, branch, _ in before}
    for stage in schedule.stages:
        if branches.get(stage.name, stage.branch) != stage.branch:
            raise UserError(
                f"stage '{stage.name}' was of branch {branches[stage.name]}, and is of branch "
                f"{stage.branch} now: give it another name"
            )
    if schedule.branch != "sft":
        _check_pretrain(progress, _of_branch(before, "pretrain"), schedule)
    sft = _of_branch(before, "sft")
    done = {name: steps for name, steps in sft[: progress.stage]}
    if progress.stage < len(sft) and progress.step:
        done[sft[progress.stage][0]] = progress.step
    stage, step = _position(done, dict(sft), schedule.sft)
    return replace(progress, stage=stage, step=step)


def _of_branch(rows: Sequence[tuple[str, str, int]], branch: str) -> list[tuple[str, int]]:
    return [(name, steps) for name, of, steps in rows if of == branch]


def _position(
    done: Mapping[str, int], before: Mapping[str, int], stages: Sequence[StageConfig]
) -> tuple[int, int]:
    """(position in ``stages``, steps done in that stage); ``done`` and ``before``: stage → its
    steps done, and its steps in the table of the checkpoint."""
    names = [stage.name for stage in stages]
    for name, steps in done.items():
        if name not in names and steps < before[name]:
            raise UserError(
                f"stage '{name}' has done {steps:,} of its {before[name]:,} steps, and the recipe "
                f"has no stage of that name: keep it, with steps={steps} to end it here"
            )
    for index, stage in enumerate(stages):
        if done.get(stage.name, 0) >= stage.steps:
            continue
        later = [s.name for s in stages[index + 1 :] if done.get(s.name)]
        if not later:
            return index, done.get(stage.name, 0)
        if stage.name in done:
            raise UserError(
                f"stage '{stage.name}' ended after {done[stage.name]:,} steps, and '{later[0]}' "
                f"has been trained since: give stages.{stage.name}.steps={done[stage.name]}"
            )
        raise UserError(
            f"stage '{stage.name}' is new, and '{later[0]}' behind it has been trained already: "
            "put it behind all stages that have been trained"
        )
    return len(stages), 0


def _check_pretrain(
    progress: Progress, before: Sequence[tuple[str, int]], schedule: Schedule
) -> None:
    """Pretraining counts its steps over all its stages: snapshots are named by them."""
    done, left = {}, progress.pretrain
    for name, steps in before:
        if left > 0:
            done[name] = min(left, steps)
            left -= steps
    index, step = _position(done, dict(before), schedule.pretrain)
    total = step + sum(stage.steps for stage in schedule.pretrain[:index])
    over = any(snapshot.cause == "final" for snapshot in progress.published)
    if over and (index < len(schedule.pretrain) or not schedule.pretrain):
        if schedule.pretrain:
            raise UserError(
                f"pretraining is over after {progress.pretrain:,} steps, and its final encoder "
                "published: it cannot be extended; give run=FOLDER for a new run with "
                "model.init_from"
            )
        return
    if total != progress.pretrain or (before and not over and index == len(schedule.pretrain)):
        raise UserError(
            f"pretraining has done {progress.pretrain:,} steps, which is no step of the stages "
            "that the recipe has now: keep those that are finished as they were, and give the one "
            "in training more steps than it has done"
        )
