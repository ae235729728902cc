"""``timeline.png``: both branches of a run, or of a plan, with swaps, drift, rates and losses."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dsasr.stages import Schedule, learning_rate
from dsasr.utils.io import atomic_path, read_lines

COLORS = ("#3b6ea5", "#d08c2f", "#4f9d69", "#a5556f", "#7a6bb0", "#8a8a8a", "#6b4a2b")
LINES = ("-", "--", ":", "-.")
DPI = 140


@dataclass(frozen=True)
class Span:
    """A stage on the run's clock: optimizer steps, counted over both branches."""

    name: str
    branch: str
    start: int
    stop: int


def spans(events: Sequence[dict[str, Any]]) -> list[Span]:
    """The stages on the run's clock; one that has not ended reaches to the last event."""
    begun: dict[str, Span] = {}
    last = max((e["steps"] for e in events if "steps" in e), default=1)
    for event in events:
        if event["event"] == "stage" and event["name"] not in begun:
            at = event["steps"]
            begun[event["name"]] = Span(event["name"], event["branch"], at, last)
        elif event["event"] == "stage_end" and event["name"] in begun:
            begun[event["name"]] = replace(begun[event["name"]], stop=event["steps"])
    return sorted(begun.values(), key=lambda s: s.start)


def plot(
    events: Sequence[dict[str, Any]],
    path: Path,
    title: str,
    *,
    cka: Sequence[tuple[int, float]] = (),
    threshold: float | None = None,
    lrs: Sequence[tuple[str, Sequence[int], Sequence[float]]] = (),
    losses: dict[str, Sequence[tuple[int, float]]] | None = None,
    clock: str = "optimizer steps of the run, both branches counted",
) -> None:
    """Both branches over the run's steps with triggers and swaps; below, what else is given.

    ``lrs``: (label, steps, learning rates) curves; ``losses``: name → (step, value); ``clock`` says
    what the steps are.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    panels = ["bars"] + ["lrs"] * bool(lrs) + ["cka"] * bool(cka) + ["losses"] * bool(losses)
    heights = [1.5 if p == "bars" else 1.2 for p in panels]
    figure, axes = plt.subplots(
        len(panels), 1, figsize=(11, 1.5 * sum(heights) + 0.8), sharex=True, squeeze=False,
        gridspec_kw={"height_ratios": heights}, layout="constrained",
    )  # fmt: skip
    held = dict(zip(panels, axes[:, 0], strict=True))
    _draw_bars(held["bars"], events, title)
    marks = [e["steps"] for e in events if e["event"] == "swap"]
    if lrs:
        _draw_lrs(held["lrs"], lrs)
    if cka:
        _draw_cka(held["cka"], cka, threshold)
    if losses:
        _draw_losses(held["losses"], losses)
    for name, axis in held.items():
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
        if name != "bars":
            for mark in marks:
                axis.axvline(mark, color="#999999", lw=0.6, zorder=0)
            axis.yaxis.grid(True, color="#eeeeee")
            axis.set_axisbelow(True)
    bottom = axes[-1][0]
    bottom.set_xlabel(clock)
    bottom.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=DPI, format="png")
    plt.close(figure)


def _draw_bars(axis, events: Sequence[dict[str, Any]], title: str) -> None:
    held = spans(events)
    last = max((s.stop for s in held), default=1)
    lanes = ["sft", "pretrain"] if any(s.branch == "pretrain" for s in held) else ["sft"]
    for i, span in enumerate(held):
        lane, width = lanes.index(span.branch), span.stop - span.start
        axis.barh(lane, width, left=span.start, height=0.46, color=COLORS[i % len(COLORS)])
        middle = (span.start + span.stop) / 2
        if width > 0.012 * last * len(span.name):
            axis.text(middle, lane, span.name, ha="center", va="center", color="white", fontsize=9)
        else:
            axis.annotate(span.name, (middle, lane - 0.24), (0, -3), textcoords="offset points",
                          ha="center", va="top", fontsize=8)  # fmt: skip
    _draw_swaps(axis, events, last, len(lanes))
    axis.set_yticks(range(len(lanes)), [f"{lane} branch" for lane in lanes])
    axis.set_ylim(-0.62, len(lanes) - 0.35)
    axis.set_xlim(0, last * 1.02)
    axis.set_title(title, fontsize=11, loc="left")
    axis.spines["left"].set_visible(False)
    axis.tick_params(axis="y", length=0)


def _draw_swaps(axis, events: Sequence[dict[str, Any]], last: int, lanes: int) -> None:
    """A published encoder is a dot on the pretrain bar, its way into the sft branch an arrow."""
    made: dict[str, int] = {}
    labeled = -last
    for event in events:
        if event["event"] == "published":
            made[event["snapshot"]] = event["steps"]
            axis.plot(event["steps"], 0.77, "o", color="#222222", ms=3.5, clip_on=False)
        elif event["event"] == "refused" and "snapshot" in event and "steps" in event:
            axis.plot(event["steps"], 0.3, "x", color="#b03a2e", ms=7)
        elif event["event"] == "swap":
            at = event["steps"]
            start = made.get(event["snapshot"], at) if lanes == 2 else at
            arrow = {"arrowstyle": "-|>", "color": "#222222", "lw": 1.1}
            axis.annotate("", (at, 0.24), (start, 0.75), arrowprops=arrow)
            if at - labeled > 0.05 * last:
                behind = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}
                axis.annotate(event["cause"], (at, 0.42), (7, 0), textcoords="offset points",
                              fontsize=8, va="center", bbox=behind)  # fmt: skip
                labeled = at


def _draw_lrs(axis, lrs) -> None:
    colors: dict[str, str] = {}
    drawn: dict[str, int] = {}
    for label, steps, values in lrs:
        stage = label.partition(":")[0]
        color = colors.setdefault(stage, COLORS[len(colors) % len(COLORS)])
        drawn[stage] = drawn.get(stage, -1) + 1
        style = LINES[drawn[stage] % len(LINES)]
        axis.plot(steps, values, color=color, ls=style, lw=1.3, label=label)
    axis.set_yscale("log")
    largest = max((max(values) for _, _, values in lrs if len(values)), default=1.0)
    axis.set_ylim(largest * 1e-4, largest * 2)
    axis.set_ylabel("learning rate")
    axis.legend(fontsize=8, loc="lower left", framealpha=0.9, edgecolor="none")


def _draw_cka(axis, cka, threshold: float | None) -> None:
    axis.plot(*zip(*cka, strict=True), marker=".", color=COLORS[0], lw=1.2)
    if threshold is not None:
        axis.axhline(threshold, color="#b03a2e", ls="--", lw=1)
        below = [point for point in cka if point[1] < threshold]
        if below:
            axis.plot(*zip(*below, strict=True), "o", color="#b03a2e", ms=5)
        axis.annotate(f"threshold {threshold:g}", (0, threshold), (4, 2), fontsize=8,
                      textcoords="offset points", color="#b03a2e")  # fmt: skip
    axis.set_ylabel("CKA to the\nreference")


def _draw_losses(axis, losses: dict[str, Sequence[tuple[int, float]]]) -> None:
    for number, (name, points) in enumerate(losses.items()):
        axis.plot(*zip(*points, strict=True), color=COLORS[number], lw=1.2, label=name)
    axis.set_ylabel("loss, nats")
    axis.set_ylim(bottom=0)
    axis.legend(fontsize=8, frameon=False)


def lr_curves(
    schedule: Schedule, events: Sequence[dict[str, Any]], points: int = 200
) -> list[tuple[str, list[int], list[float]]]:
    """Each group's rate over the run's steps; a stage's steps are spread over its span.

    Groups of equal rates share a curve.
    """
    stages, curves = {s.name: s for s in schedule.stages}, []
    for span in spans(events):
        stage = stages[span.name]
        count = min(points, stage.steps)
        own = sorted({*(i * (stage.steps - 1) // max(count - 1, 1) for i in range(count))})
        own = sorted({*own, min(stage.warmup_steps, stage.steps - 1)})
        wide = (span.stop - span.start) / max(stage.steps - 1, 1)
        at = [round(span.start + s * wide) for s in own]
        alike: dict[float, list[str]] = {}
        for part, peak in stage.trains.items():
            alike.setdefault(peak, []).append(part)
        for parts in alike.values():
            values = [learning_rate(stage, parts[0], s) for s in own]
            curves.append((f"{stage.name}: {', '.join(parts)}", at, values))
    return curves


def plot_run(folder: Path) -> Path:
    """``timeline.png`` of a run folder, from its events and metrics. Raises `OSError` or
    ValueError where these cannot be read."""
    events = _read(folder / "events.jsonl")
    metrics = _read(folder / "metrics.jsonl")
    cka = [(m["steps"], m["cka"]) for m in metrics if m.get("cka") is not None]
    threshold = next((m["cka_threshold"] for m in metrics if "cka_threshold" in m), None)
    losses = {
        label: points
        for label, key in (("CTC (pretrain)", "ctc"), ("transcript (sft)", "nll"))
        if (points := [(m["steps"], m[key]) for m in metrics if m.get(key) is not None])
    }
    path = folder / "timeline.png"
    title = f"{folder.name}: stages, encoder swaps, drift"
    plot(events, path, title, cka=cka, threshold=threshold, losses=losses)
    return path


def _read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in read_lines(path)]
