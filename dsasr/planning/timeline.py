"""What a recipe will do, before any of it is done: stages, groups, rates, swaps, memory a rank.

``dsasr timeline`` prints it. The same picture, drawn from a run's own events, is the run folder's
``timeline.png`` (`dsasr.tracking.timeline_plot`).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dsasr import recipe as recipes
from dsasr.build import Builder
from dsasr.stages import (
    PARTS,
    PlannedSwap,
    Progress,
    Schedule,
    Snapshot,
    StageConfig,
    add_published,
    learning_rate,
)
from dsasr.utils.errors import UserError


def simulate(schedule: Schedule, triggers: Sequence[int] = ()) -> list[dict[str, Any]]:
    """The events of a run whose CKA falls below the threshold at pretrain steps ``triggers``.

    Exact, and one iteration a step: `shrink` long schedules first.
    """
    progress, events = Progress(), []
    if schedule.pretrain is None or schedule.branch == "sft":
        given = Snapshot("given", 0, "final" if schedule.pretrain else "given")
        progress = add_published(progress, [given])
    while (turn := schedule.next_turn(progress)).kind == "step":
        steps, stage = progress.pretrain + progress.sft, turn.stage
        here = {"steps": steps, "branch": stage.branch}
        if turn.step == 0:
            events.append({"event": "stage", "name": stage.name, **here})
        if turn.load is not None:
            named = {"snapshot": turn.load.id, "cause": turn.load.cause, "stage": stage.name}
            events.append({"event": "swap", "pretrain": turn.load.pretrain, **named, **here})
        progress = schedule.advance(progress, turn)
        here["steps"] += 1
        if turn.step + 1 == stage.steps:
            events.append({"event": "stage_end", "name": stage.name, **here})
        if stage.branch != "pretrain":
            continue
        at = progress.pretrain
        cause = schedule.publishes_at(at) or ("drift" if at in triggers else None)
        if cause:
            snapshot = Snapshot(f"encoder-{at:09d}", at, cause)
            progress = add_published(progress, [snapshot])
            named = {"snapshot": snapshot.id, "cause": cause, "pretrain": at}
            events.append({"event": "published", **named, **here})
    return events


def shrink(schedule: Schedule, most: int = 20_000) -> tuple[Schedule, int]:
    """The schedule with all lengths divided so that it has about ``most`` steps; the divisor."""
    total = sum(s.steps for s in schedule.stages)
    by = max(1, -(-total // most))
    if by == 1:
        return schedule, 1
    # Swaps that fall together when divided are one: the last of them.
    swaps = {
        max(1, s.pretrain // by): None if s.sft is None else s.sft // by
        for s in schedule.drift.swaps
    }
    planned = tuple(PlannedSwap(pretrain, sft) for pretrain, sft in swaps.items())
    drift = replace(schedule.drift, swaps=planned)
    return replace(
        schedule, stages=tuple(_shorter(s, by) for s in schedule.stages), drift=drift
    ), by


def _shorter(stage: StageConfig, by: int) -> StageConfig:
    steps = max(1, stage.steps // by)
    warmup = min(stage.warmup_steps // by, max(steps - 1, 0))
    return replace(
        stage,
        steps=steps,
        warmup_steps=warmup,
        steps_after_final_swap=stage.steps_after_final_swap // by,
    )


def course(schedule: Schedule, triggers: Sequence[int]) -> list[dict[str, Any]]:
    """`simulate` of a schedule of any length, to within a 20,000th of it."""
    small, by = shrink(schedule)
    events = simulate(small, [t // by for t in triggers])
    counted = ("steps", "pretrain")
    return [{k: v * by if k in counted else v for k, v in e.items()} for e in events]


# -- sizes -------------------------------------------------------------------------------------


def part_sizes(recipe: recipes.Recipe) -> dict[str, int]:
    """Parameters of each part, counted on the meta device; the LLM's from its settings.

    A part whose files are not there yet is left out.
    """
    from transformers import AutoModelForCausalLM

    from dsasr.model import lora
    from dsasr.model.adaptor import Adaptor
    from dsasr.model.ctc import CtcHead
    from dsasr.model.encoders.conformer import Encoder
    from dsasr.model.llm_hub import llm_config

    sizes = {}
    with torch.device("meta"):
        encoder = Encoder(recipe.model.encoder)
        sizes["encoder"] = _count(encoder)
        with suppress(UserError):
            config = llm_config(recipe.model.llm.path)
            llm = AutoModelForCausalLM.from_config(config)
            sizes["llm"] = _count(llm)
            if recipe.model.lora is not None:
                sizes["lora"] = lora.count(llm, recipe.model.lora)
            width = config.get_text_config().hidden_size
            sizes["adaptor"] = _count(Adaptor(recipe.model.adaptor, encoder.cfg.width, width))
        if Path(recipe.data.phonemes).is_file():
            head = CtcHead(recipe.model.encoder.width, len(Builder(recipe).phonemes))
            sizes["ctc"] = _count(head)
    return sizes


def _count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def memory(
    recipe: recipes.Recipe, stage: StageConfig, sizes: dict[str, int], ranks: int
) -> float | None:
    """GiB a rank of weights, gradients, masters and moments under ZeRO-3, without activations.

    The other branch is counted with what it keeps where it is; None where a part's size is not
    known.
    """
    low = 4 if recipe.engine.precision == "fp32" else 2  # bytes of a weight or gradient
    total = 0
    for branch in PARTS:
        parts = recipe.parts(branch)
        own = branch == stage.branch
        if not own and (recipe.branch != "both" or recipe.schedule().pretrain is None):
            continue
        if not own and stage.needs_final_encoder:
            continue  # pretraining is over, and its branch was closed
        if any(p not in sizes for p in parts):
            return None
        total += low * sum(sizes[p] for p in parts)
        if own:
            total += (low + 12) * sum(sizes[p] for p in stage.trains)
        elif recipe.engine.offload.device == "none":
            rows = [s for s in recipe.stages if s.branch == branch]
            total += 12 * max((sum(sizes[p] for p in s.trains) for s in rows), default=0)
    return total / ranks / 2**30


# -- text --------------------------------------------------------------------------------------


def table(recipe: recipes.Recipe, ranks: int = 8) -> str:
    """The stage table as text: what trains, on what, how long, at which rates."""
    sizes, schedule = part_sizes(recipe), recipe.schedule()
    lines = []
    for number, stage in enumerate(schedule.stages, 1):
        frozen = [p for p in recipe.parts(stage.branch) if p not in stage.trains]
        held = memory(recipe, stage, sizes, ranks)
        room = "not known" if held is None else f"{_bytes(held)} a rank on {ranks} ranks"
        lines += [
            f"{number} {stage.name}: {stage.steps:,} steps of {stage.objective} "
            f"({stage.branch} branch)",
            *(_group(stage, part, sizes) for part in stage.trains),
            f"    frozen   {', '.join(frozen) or '–'}{_encoder_note(schedule, stage)}",
            f"    memory   {room}{'' if held is None else ', activations not counted'}",
        ]
    wanted = {p for s in schedule.stages for p in recipe.parts(s.branch)}
    missing = sorted(wanted - sizes.keys())
    if missing:
        files = {"ctc": "data.phonemes", "adaptor": "model.llm.path", "llm": "model.llm.path"}
        files["lora"] = "model.llm.path"
        wanted_files = " and ".join(sorted({files[p] for p in missing}))
        lines.append(
            f"sizes of {', '.join(missing)}, and so the memory, not known: {wanted_files} not there"
        )
    return "\n".join(lines)


def _group(stage: StageConfig, part: str, sizes: dict[str, int]) -> str:
    middle = (stage.warmup_steps + stage.steps) // 2
    marks = sorted({0, stage.warmup_steps, middle, stage.steps - 1})
    rates = ", ".join(f"{learning_rate(stage, part, m):.1e} at {m:,}" for m in marks)
    return f"    trains   {part:<8}{_short(sizes.get(part)):>8}   rate {rates}"


def _encoder_note(schedule: Schedule, stage: StageConfig) -> str:
    if stage.branch == "pretrain":
        return ""
    if stage.needs_final_encoder:
        return "; starts from the final encoder"
    notes = ["takes newer encoders while it runs" if stage.swaps else "keeps its encoder"]
    if stage.steps_after_final_swap and schedule.pretrain is not None:
        notes.append(f"the last {stage.steps_after_final_swap:,} steps wait for the final one")
    return "; " + "; ".join(notes)


def rule(schedule: Schedule) -> str:
    """One line: when an encoder is published."""
    drift = schedule.drift
    if schedule.pretrain is None:
        return "encoder: given (model.encoder_from), never swapped"
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


def _short(count: int | None) -> str:
    if count is None:
        return "?"
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return str(count)


def _bytes(gib: float) -> str:
    return f"{gib:.3g} GiB" if gib >= 0.1 else f"{1024 * gib:.3g} MiB"


def describe(events: Sequence[dict[str, Any]], within: int = 1) -> str:
    """The order of events, one line each; ``within``: steps to which they are known."""
    close = f"; to within {within:,}" if within > 1 else ""
    lines = [f"{'step':>12}  (of the run, both branches counted{close})"]
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
