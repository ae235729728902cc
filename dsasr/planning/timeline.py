"""What a recipe will do, before training: stages, learning rates, encoder swaps, memory.

``dsasr timeline`` prints it. The same picture, drawn from a run's own events, is the run folder's
``timeline.png`` (`dsasr.tracking.timeline_plot`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from dsasr import recipe as recipes
from dsasr.planning.memory import (
    Machine,
    Traffic,
    between_steps,
    resident_parts,
    step_memory,
)
from dsasr.planning.model_parts import (
    ModelPart,
    assumptions,
    count_llm_parts,
    count_speech_parts,
)
from dsasr.schedule import GIVEN, Progress, Schedule, Snapshot, add_published
from dsasr.stages import PlannedSwap, StageConfig, learning_rate
from dsasr.utils.errors import UserError


def simulate(schedule: Schedule, drift_steps: Sequence[int] = ()) -> list[dict[str, Any]]:
    """The events of a run whose CKA falls below the threshold at pretrain steps ``drift_steps``.

    Exact, one iteration a step: for long schedules see `simulate_scaled`.
    """
    progress, events = Progress(), []
    if not schedule.pretrain or schedule.branch == "sft":
        cause = "final" if schedule.pretrain else GIVEN
        progress = add_published(progress, [Snapshot(GIVEN, 0, cause)])
    while (turn := schedule.next_turn(progress)).kind == "step":
        steps, stage = progress.pretrain + progress.sft, turn.stage
        where = {"steps": steps, "branch": stage.branch}
        if turn.step == 0:
            events.append({"event": "stage", "name": stage.name, **where})
        if turn.load is not None:
            loaded = {"snapshot": turn.load.id, "cause": turn.load.cause, "stage": stage.name}
            events.append({"event": "swap", "pretrain": turn.load.pretrain, **loaded, **where})
        progress = schedule.advance(progress, turn)
        where["steps"] += 1
        if turn.step + 1 == stage.steps:
            events.append({"event": "stage_end", "name": stage.name, **where})
        if stage.branch != "pretrain":
            continue
        step = progress.pretrain
        cause = schedule.publishes_at(step) or ("drift" if step in drift_steps else None)
        if cause:
            snapshot = Snapshot(f"encoder-{step:09d}", step, cause)
            progress = add_published(progress, [snapshot])
            published = {"snapshot": snapshot.id, "cause": cause, "pretrain": step}
            events.append({"event": "published", **published, **where})
    return events


def scale_down(schedule: Schedule, max_steps: int = 20_000) -> tuple[Schedule, int]:
    """The schedule with all lengths divided so that it has about ``max_steps``; the divisor."""
    total = sum(s.steps for s in schedule.stages)
    divisor = max(1, -(-total // max_steps))
    if divisor == 1:
        return schedule, 1
    stages = tuple(_scale_stage(s, divisor) for s in schedule.stages)
    most = {b: sum(s.steps for s in stages if s.branch == b) for b in ("pretrain", "sft")}
    # Of swaps that fall on one step when divided, the last stands for all.
    swaps = {
        max(1, min(s.pretrain // divisor, most["pretrain"])): (
            None if s.sft is None else max(0, min(s.sft // divisor, most["sft"] - 1))
        )
        for s in schedule.drift.swaps
    }
    planned = tuple(PlannedSwap(pretrain, sft) for pretrain, sft in swaps.items())
    drift = replace(schedule.drift, swaps=planned)
    return replace(schedule, stages=stages, drift=drift), divisor


def _scale_stage(stage: StageConfig, divisor: int) -> StageConfig:
    steps = max(1, stage.steps // divisor)
    return replace(
        stage,
        steps=steps,
        warmup_steps=min(stage.warmup_steps // divisor, max(steps - 1, 0)),
        steps_after_final_swap=stage.steps_after_final_swap // divisor,
    )


def simulate_scaled(
    schedule: Schedule, drift_steps: Sequence[int]
) -> tuple[list[dict[str, Any]], int]:
    """(`simulate` of a schedule of any length, the steps to which its events are known)."""
    small, divisor = scale_down(schedule)
    events = simulate(small, [step // divisor for step in drift_steps])
    scaled = ("steps", "pretrain")
    return [{k: v * divisor if k in scaled else v for k, v in e.items()} for e in events], divisor


def paper_drift_steps(schedule: Schedule) -> list[int]:
    """Pretrain steps at which drift triggered in the paper's run, 50.5% and 66% of pretraining, as
    far as they come after the schedule's first reference."""
    if schedule.drift.mode != "cka" or not schedule.pretrain:
        return []
    total = schedule.pretrain_steps()
    reference, _ = schedule.drift_steps()
    return [step for step in (round(0.505 * total), round(0.66 * total)) if step > reference]


# -- sizes -------------------------------------------------------------------------------------


def known_parts(recipe: recipes.Recipe) -> dict[str, ModelPart]:
    """The model's parts, without those whose files are not there yet."""
    parts: dict[str, ModelPart] = {}
    with suppress(UserError):
        parts |= count_speech_parts(recipe)
        parts |= count_llm_parts(recipe)
    return parts


# -- text --------------------------------------------------------------------------------------


def stage_table(recipe: recipes.Recipe, ranks: int = 8) -> str:
    """The stage table as text: what trains, for how long, at which learning rates, in how much
    memory of each of ``ranks`` GPUs (`step_memory`, as in ``dsasr plan cluster``)."""
    parts, schedule = known_parts(recipe), recipe.schedule()
    lines = []
    for number, stage in enumerate(schedule.stages, 1):
        frozen = [p for p in recipe.parts(stage.branch) if p not in stage.trains]
        lines += [
            f"{number} {stage.name}: {stage.steps:,} steps of {stage.objective} "
            f"({stage.branch} branch)",
            *(_group(stage, part, parts) for part in stage.trains),
            f"    frozen   {', '.join(frozen) or '–'}{_encoder_note(schedule, stage)}",
            f"    memory   {_memory_note(recipe, stage, parts, ranks)}",
        ]
    lines.append(
        f"memory: on GPUs, with batches full of utterances of {Traffic().seconds:g} s; by part: "
        "dsasr plan cluster"
    )
    missing = sorted({p for s in schedule.stages for p in recipe.parts(s.branch)} - parts.keys())
    if missing:
        path = "encoder" if "encoder" in missing else "llm"
        lines.append(
            f"sizes of {', '.join(missing)}, and so the memory, not known: model.{path}.path not "
            "there"
        )
    return "\n".join([*lines, *(f"assumed: {line}" for line in _assumed(recipe, missing))])


def _assumed(recipe: recipes.Recipe, missing: Sequence[str]) -> list[str]:
    return [] if "llm" in missing else list(assumptions(recipe))


def _memory_note(
    recipe: recipes.Recipe, stage: StageConfig, parts: Mapping[str, ModelPart], ranks: int
) -> str:
    if not set(resident_parts(recipe, stage)) <= parts.keys():
        return "not known"
    memory = step_memory(recipe, stage, Machine(nodes=1, gpus=ranks), parts)
    return (
        f"{sum(memory.values()):.3g} GB a rank on {ranks} ranks, "
        f"{between_steps(memory):.3g} GB of it also between steps"
    )


def _group(stage: StageConfig, name: str, parts: Mapping[str, ModelPart]) -> str:
    middle = (stage.warmup_steps + stage.steps) // 2
    marks = sorted({0, stage.warmup_steps, middle, stage.steps - 1})
    rates = ", ".join(f"{learning_rate(stage, name, m):.1e} at {m:,}" for m in marks)
    size = _format_count(parts[name].parameters) if name in parts else "?"
    return f"    trains   {name:<12} {size:>7}   lr {rates}"


def _encoder_note(schedule: Schedule, stage: StageConfig) -> str:
    if stage.branch == "pretrain":
        return ""
    if stage.trains_sft_encoder:
        return "; starts from the final encoder"
    notes = ["takes newer encoders while it runs" if stage.swaps else "keeps its encoder"]
    if stage.steps_after_final_swap and schedule.pretrain:
        notes.append(f"the last {stage.steps_after_final_swap:,} steps wait for the final one")
    return "; " + "; ".join(notes)


def swap_rule(schedule: Schedule) -> str:
    """One line: when pretraining publishes an encoder."""
    drift = schedule.drift
    if not schedule.pretrain:
        return "encoder: from outside the run, never swapped"
    if drift.mode == "cka":
        first, interval = schedule.drift_steps()
        return (
            f"encoders: reference after pretrain step {first:,}, then CKA every {interval:,} steps "
            f"on {drift.probe_utterances} utterances; below {drift.threshold} the encoder is "
            "published and becomes the reference; once more at the end"
        )
    if drift.mode == "fixed":
        steps = ", ".join(f"{s.pretrain:,}" for s in drift.swaps)
        return f"encoders: published after pretrain steps {steps}, and at the end"
    return "encoders: published once, when pretraining ends"


def _format_count(count: int) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return str(count)


def format_events(events: Sequence[dict[str, Any]], accuracy: int = 1) -> str:
    """The events in order, one line each; ``accuracy``: the steps to which they are known."""
    note = f"; to within {accuracy:,}" if accuracy > 1 else ""
    lines = [f"{'step':>12}  (of the run, both branches counted{note})"]
    for event in events:
        kind = event["event"]
        if kind in ("stage", "stage_end"):
            what = f"{event['name']} {'begins' if kind == 'stage' else 'ends'}"
        elif kind == "published":
            what = f"encoder of pretrain step {event['pretrain']:,} published ({event['cause']})"
        else:
            what = f"{event['stage']} takes the encoder of pretrain step {event['pretrain']:,}"
        lines.append(f"{event['steps']:>12,}  {what}")
    return "\n".join(lines)
