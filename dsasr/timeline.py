"""What a recipe will do, before any of it is done: stages, groups, rates, swaps, memory a rank.

``python -m dsasr.stages --recipe R [--plot FILE]``. The same picture, drawn from a run's own events,
is the run folder's ``timeline.png``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from dsasr import recipe as recipes
from dsasr.build import Builder
from dsasr.files import atomic_path
from dsasr.stages import Progress, Schedule, Snapshot, StageConfig, learning_rate, with_published

BYTES = {"weights": 2, "gradients": 2, "masters and moments": 12}
COLOURS = ("#3b6ea5", "#d08c2f", "#4f9d69", "#a5556f", "#7a6bb0", "#8a8a8a")


@dataclass(frozen=True)
class Span:
    """Consecutive steps of one stage on the run's clock (optimizer steps of both branches)."""

    stage: StageConfig
    start: int  # first step of the run in it
    stop: int
    first: int  # the stage's own steps, from first to last + 1
    last: int


def simulate(schedule: Schedule, triggers: Sequence[int] = ()) -> list[dict]:
    """The events of a run whose CKA falls below the threshold at pretrain steps ``triggers``.

    Without a model and exact to the step, but in jumps: between two decisions the branches only
    take turns, so millions of steps are walked in as many iterations as there are turns of a stage.
    """
    progress, events = Progress(), []
    if schedule.pretrain is None or schedule.branch == "sft":
        given = Snapshot("given", 0, "final" if schedule.pretrain else "given")
        progress = with_published(progress, [given])
    while (turn := schedule.at(progress)).kind == "step":
        steps = progress.pretrain + progress.sft
        if turn.load is not None:
            events.append({"event": "swap", "steps": steps, "snapshot": turn.load.id,
                           "cause": turn.load.cause, "stage": turn.stage.name})
        if turn.step == 0:
            events.append({"event": "stage", "steps": steps, "name": turn.stage.name})
        progress = schedule.advance(progress, turn)
        if turn.step + 1 == turn.stage.steps:
            events.append({"event": "stage_end", "steps": steps + 1, "name": turn.stage.name})
        if turn.stage.branch != "pretrain":
            continue
        at = progress.pretrain
        cause = schedule.publishes_at(at) or ("drift" if at in triggers else None)
        if cause:
            progress = with_published(progress, [Snapshot(f"encoder-{at:09d}", at, cause)])
            events.append({"event": "published", "steps": steps + 1, "pretrain": at,
                           "snapshot": f"encoder-{at:09d}", "cause": cause})
    return events


def shrink(schedule: Schedule, most: int = 20_000) -> tuple[Schedule, int]:
    """The schedule with all lengths divided so that it has about ``most`` steps; and the divisor."""
    total = sum(s.steps for s in schedule.stages)
    by = max(1, -(-total // most))
    if by == 1:
        return schedule, 1
    from dataclasses import replace

    stages = tuple(
        replace(s, steps=max(1, s.steps // by), warmup=min(s.warmup // by, max(s.steps // by - 1, 0)),
                after_final=s.after_final // by)
        for s in schedule.stages
    )
    return replace(schedule, stages=stages), by


def part_sizes(recipe: recipes.Recipe) -> dict[str, int]:
    """Parameters of each part, counted on the meta device; the LLM's from its config.json."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from dsasr.model.adaptor import Adaptor
    from dsasr.model.encoder import Encoder

    sizes = {}
    with torch.device("meta"):
        encoder = Encoder(recipe.model.encoder)
        sizes["encoder"] = _count(encoder)
        path = Path(recipe.model.llm.path)
        if (path / "config.json").is_file():
            config = AutoConfig.from_pretrained(path, local_files_only=True)
            llm = AutoModelForCausalLM.from_config(config)
            sizes["llm"] = _count(llm)
            width = config.get_text_config().hidden_size
            sizes["adaptor"] = _count(Adaptor(recipe.model.adaptor, encoder.cfg.width, width))
    if Path(recipe.data.phonemes).is_file():
        sizes["ctc"] = (recipe.model.encoder.width + 1) * len(Builder(recipe).phonemes)
    return sizes


def _count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def memory(recipe: recipes.Recipe, stage: StageConfig, sizes: dict[str, int], ranks: int) -> float:
    """GiB a rank of weights, gradients, masters and moments under ZeRO-3 (no activations)."""
    parts = ("encoder", "ctc") if stage.branch == "pretrain" else ("encoder", "adaptor", "llm")
    held = sum(sizes.get(p, 0) for p in parts) * BYTES["weights"]
    trained = sum(sizes.get(p, 0) for p in stage.trains)
    held += trained * (BYTES["gradients"] + BYTES["masters and moments"])
    return held / ranks / 2**30


def table(recipe: recipes.Recipe, ranks: int = 8) -> str:
    """The stage table as text."""
    sizes = part_sizes(recipe)
    schedule = recipe.schedule()
    lines = [
        f"{'stage':<12}{'branch':<10}{'steps':>10}  {'objective':<10}{'trains (parameters, max rate)':<62}"
        f"{f'GiB/rank at {ranks}':>16}"
    ]
    for stage in schedule.stages:
        groups = ", ".join(
            f"{part} ({_short(sizes.get(part))}, {rate:g})" for part, rate in stage.trains.items()
        )
        lines.append(
            f"{stage.name:<12}{stage.branch:<10}{stage.steps:>10,}  {stage.objective:<10}{groups:<62}"
            f"{memory(recipe, stage, sizes, ranks):>16.3f}"
        )
        marks = [0, stage.warmup, (stage.warmup + stage.steps) // 2, stage.steps - 1]
        part = next(iter(stage.trains))
        rates = "  ".join(f"{m:,}: {learning_rate(stage, part, m):.3g}" for m in sorted(set(marks)))
        lines.append(f"{'':<12}rate of {part} at step  {rates}")
    first, interval = schedule.monitoring()
    drift = recipe.drift
    if schedule.pretrain and drift.mode == "cka":
        lines.append(
            f"drift: reference after pretrain step {first:,}, CKA every {interval:,} steps on "
            f"{drift.probe_utterances} utterances, threshold {drift.threshold}"
        )
    elif drift.mode == "fixed":
        lines.append("drift: fixed swaps at pretrain steps " + ", ".join(str(s.pretrain) for s in drift.swaps))
    return "\n".join(lines)


def _short(count: int | None) -> str:
    if count is None:
        return "size unknown"
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return str(count)


def describe(schedule: Schedule, triggers: Sequence[int]) -> str:
    """The order of events, one line each."""
    small, by = shrink(schedule)
    lines = ["order of events (step of the run, over both branches):"]
    for event in simulate(small, [t // by for t in triggers]):
        what = {
            "stage": lambda e: f"{e['name']} begins",
            "stage_end": lambda e: f"{e['name']} ends",
            "published": lambda e: f"encoder of pretrain step {e['pretrain'] * by:,} published ({e['cause']})",
            "swap": lambda e: f"{e['stage']} takes the encoder ({e['cause']})",
        }[event["event"]](event)
        lines.append(f"{event['steps'] * by:>12,}  {what}")
    return "\n".join(lines)


def plot(events: Sequence[dict], path: Path, title: str, cka: Sequence[tuple[int, float]] = (),
         threshold: float | None = None) -> None:
    """Both branches over the run's steps, with triggers and swaps; CKA below where it was measured."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = 2 if cka else 1
    figure, axes = plt.subplots(
        rows, 1, figsize=(11, 2.6 + 2.2 * (rows - 1)), sharex=True, squeeze=False,
        gridspec_kw={"height_ratios": [1.3, 1][:rows]}, layout="constrained",
    )
    axis = axes[0][0]
    begun: dict[str, int] = {}
    spans: list[tuple[str, int, int]] = []
    for event in events:
        if event["event"] == "stage":
            begun.setdefault(event["name"], event["steps"])
        elif event["event"] == "stage_end" and event["name"] in begun:
            spans.append((event["name"], begun.pop(event["name"]), event["steps"]))
    last = max((e["steps"] for e in events), default=1)
    spans += [(name, start, last) for name, start in begun.items()]
    for i, (name, start, stop) in enumerate(sorted(spans, key=lambda s: s[1])):
        lane = 1 if name == "pretrain" else 0
        axis.barh(lane, stop - start, left=start, height=0.5, color=COLOURS[i % len(COLOURS)], label=name)
        if stop - start > 0.04 * last:
            axis.text((start + stop) / 2, lane, name, ha="center", va="center", color="white", fontsize=9)
    for event in events:
        if event["event"] == "swap":
            axis.annotate("", (event["steps"], 0.27), (event["steps"], 0.73),
                          arrowprops={"arrowstyle": "-|>", "color": "#222222", "lw": 1.2})
            axis.text(event["steps"], 0.5, f" {event['cause']}", fontsize=8, va="center")
    axis.set_yticks([0, 1], ["sft branch", "pretrain branch"])
    axis.set_ylim(-0.45, 1.45)
    axis.set_xlim(0, last * 1.01)
    axis.set_title(title, fontsize=11)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
    axis.tick_params(axis="y", length=0)
    if cka:
        below = axes[1][0]
        below.plot(*zip(*cka, strict=True), marker=".", color=COLOURS[0], lw=1.2)
        if threshold is not None:
            below.axhline(threshold, color="#b03a2e", ls="--", lw=1)
            below.text(0, threshold, " threshold", color="#b03a2e", fontsize=8, va="bottom")
        below.set_ylabel("CKA to the reference")
        for side in ("top", "right"):
            below.spines[side].set_visible(False)
    axes[-1][0].set_xlabel("optimizer steps of the run (both branches)")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=130, format="png")
    plt.close(figure)


def plot_run(folder: Path) -> Path:
    """``timeline.png`` of a run folder, from its events and metrics."""
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    cka = [(m["steps"], m["cka"]) for m in metrics if "cka" in m]
    threshold = next((m["cka_threshold"] for m in metrics if "cka_threshold" in m), None)
    path = folder / "timeline.png"
    plot(events, path, f"Stages and encoder swaps of {folder.name}", cka, threshold)
    return path


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m dsasr.stages", description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", required=True, help="a packaged recipe's name, or a YAML file")
    parser.add_argument("--ranks", type=int, default=8, help="ranks that share the memory")
    parser.add_argument("--triggers", type=int, nargs="*", default=None, metavar="STEP",
                        help="pretrain steps at which CKA is assumed to fall below the threshold "
                        "(default: 50%% and 66%% of pretraining, as in the paper's run)")
    parser.add_argument("--plot", type=Path, help="write the timeline as a PNG")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_args(arguments)
    recipe = recipes.load(options.recipe, options.overrides)
    schedule = recipe.schedule()
    triggers = options.triggers
    if triggers is None:
        total = schedule.pretrain_steps()
        triggers = [round(0.505 * total), round(0.66 * total)] if recipe.drift.mode == "cka" else []
    print(table(recipe, options.ranks))
    print(describe(schedule, triggers))
    if options.plot:
        small, by = shrink(schedule)
        events = [{**e, "steps": e["steps"] * by} for e in simulate(small, [t // by for t in triggers])]
        plot(events, options.plot, f"Planned course of recipe {options.recipe}")
        print(f"timeline: {options.plot}")
    return 0
