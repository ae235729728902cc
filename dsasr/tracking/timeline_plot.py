"""The plot of a run's timeline: stages of both branches, swaps, drift, learning rates, losses."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from dsasr.schedule import Schedule
from dsasr.stages import learning_rate
from dsasr.tracking.run_log import Row, read_events, read_metrics
from dsasr.utils.io import atomic_path

COLORS = ("#3b6ea5", "#d08c2f", "#4f9d69", "#a5556f", "#7a6bb0", "#8a8a8a", "#6b4a2b")
LINES = ("-", "--", ":", "-.")
DPI = 140
# The curve of each branch's loss.
LOSSES = {"pretrain": "CTC, nats a phoneme", "sft": "transcript, nats a token"}


def literal(text: str) -> str:
    """A name as matplotlib shows it as it is: between dollar signs it would read a formula."""
    return text.replace("$", r"\$")


@dataclass(frozen=True)
class Span:
    """A stage from its first to its last step, in optimizer steps of both branches together."""

    name: str
    branch: str
    start: int
    stop: int


def stage_spans(events: Sequence[Row]) -> list[Span]:
    """The spans of the stages, by start; a stage that has not ended reaches to the last event."""
    spans: dict[str, Span] = {}
    last = max((e["steps"] for e in events if "steps" in e), default=1)
    for event in events:
        if event["event"] == "stage" and event["name"] not in spans:
            spans[event["name"]] = Span(event["name"], event["branch"], event["steps"], last)
        elif event["event"] == "stage_end" and event["name"] in spans:
            spans[event["name"]] = replace(spans[event["name"]], stop=event["steps"])
    return sorted(spans.values(), key=lambda s: s.start)


def plot(
    events: Sequence[Row],
    path: Path,
    title: str,
    *,
    cka: Sequence[tuple[int, float]] = (),
    threshold: float | None = None,
    lrs: Sequence[tuple[str, Sequence[int], Sequence[float]]] = (),
    losses: dict[str, Sequence[tuple[int, float]]] | None = None,
    held_out: dict[str, Sequence[tuple[int, float]]] | None = None,
    x_label: str = "optimizer steps of the run, both branches counted",
) -> None:
    """Write a PNG of both branches over the run's steps with published snapshots and swaps.

    Panels below it, each where it has data: ``lrs``, curves of (label, steps, learning rates);
    ``cka``, points of (step, CKA) with the ``threshold``; ``losses``, name → (step, value), and
    ``held_out``, those of the same names on the validation set.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    panels = ["stages"] + ["lrs"] * bool(lrs) + ["cka"] * bool(cka) + ["losses"] * bool(losses)
    heights = [1.5 if p == "stages" else 1.2 for p in panels]
    figure, axes = plt.subplots(
        len(panels), 1, figsize=(11, 1.5 * sum(heights) + 0.8), sharex=True, squeeze=False,
        gridspec_kw={"height_ratios": heights}, layout="constrained",
    )  # fmt: skip
    axis_of = dict(zip(panels, axes[:, 0], strict=True))
    _draw_stages(axis_of["stages"], events, title)
    swap_steps = [e["steps"] for e in events if e["event"] == "swap"]
    if lrs:
        _draw_lrs(axis_of["lrs"], lrs)
    if cka:
        published = [e["steps"] for e in events if e["event"] == "published"]
        _draw_cka(axis_of["cka"], split_after(cka, published), threshold)
    if losses:
        _draw_losses(axis_of["losses"], losses, held_out or {})
    for name, axis in axis_of.items():
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
        if name != "stages":
            for step in swap_steps:
                axis.axvline(step, color="#999999", lw=0.6, zorder=0)
            axis.yaxis.grid(True, color="#eeeeee")
            axis.set_axisbelow(True)
    bottom = axes[-1][0]
    bottom.set_xlabel(x_label)
    bottom.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=DPI, format="png")
    plt.close(figure)


def _draw_stages(axis, events: Sequence[Row], title: str) -> None:
    spans = stage_spans(events)
    last = max((s.stop for s in spans), default=1)
    lanes = ["sft", "pretrain"] if any(s.branch == "pretrain" for s in spans) else ["sft"]
    for i, span in enumerate(spans):
        lane, width = lanes.index(span.branch), span.stop - span.start
        axis.barh(lane, width, left=span.start, height=0.46, color=COLORS[i % len(COLORS)])
        middle = (span.start + span.stop) / 2
        name = literal(span.name)
        if width > 0.012 * last * len(name):
            axis.text(middle, lane, name, ha="center", va="center", color="white", fontsize=9)
        else:
            axis.annotate(name, (middle, lane - 0.24), (0, -3), textcoords="offset points",
                          ha="center", va="top", fontsize=8)  # fmt: skip
    _draw_swaps(axis, events, last, len(lanes))
    axis.set_yticks(range(len(lanes)), [f"{lane} branch" for lane in lanes])
    axis.set_ylim(-0.62, len(lanes) - 0.35)
    axis.set_xlim(0, last * 1.02)
    axis.set_title(literal(title), fontsize=11, loc="left")
    axis.spines["left"].set_visible(False)
    axis.tick_params(axis="y", length=0)


def _draw_swaps(axis, events: Sequence[Row], last: int, lanes: int) -> None:
    """A published encoder is a dot on the pretrain bar, its swap into the sft branch an arrow."""
    published_at: dict[str, int] = {}
    labeled = -last
    for event in events:
        if event["event"] == "published":
            published_at[event["snapshot"]] = event["steps"]
            axis.plot(event["steps"], 0.77, "o", color="#222222", ms=3.5, clip_on=False)
        elif event["event"] == "refused" and "snapshot" in event and "steps" in event:
            axis.plot(event["steps"], 0.3, "x", color="#b03a2e", ms=7)
        elif event["event"] == "swap":
            step = event["steps"]
            start = published_at.get(event["snapshot"], step) if lanes == 2 else step
            arrow = {"arrowstyle": "-|>", "color": "#222222", "lw": 1.1}
            axis.annotate("", (step, 0.24), (start, 0.75), arrowprops=arrow)
            if step - labeled > 0.05 * last:
                behind = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}
                axis.annotate(
                    literal(event["cause"]), (step, 0.42), (7, 0), textcoords="offset points",
                    fontsize=8, va="center", bbox=behind,
                )  # fmt: skip
                labeled = step


def _draw_lrs(axis, lrs) -> None:
    colors: dict[str, str] = {}
    drawn: dict[str, int] = {}
    for label, steps, values in lrs:
        stage = label.partition(":")[0]
        color = colors.setdefault(stage, COLORS[len(colors) % len(COLORS)])
        drawn[stage] = drawn.get(stage, -1) + 1
        style = LINES[drawn[stage] % len(LINES)]
        axis.plot(steps, values, color=color, ls=style, lw=1.3, label=literal(label))
    axis.set_yscale("log")
    largest = max((max(values) for _, _, values in lrs if len(values)), default=1.0)
    axis.set_ylim(largest * 1e-4, largest * 2)
    axis.set_ylabel("learning rate")
    axis.legend(fontsize=8, loc="lower left", framealpha=0.9, edgecolor="none")


def split_after(
    points: Sequence[tuple[int, float]], published: Sequence[int]
) -> list[list[tuple[int, float]]]:
    """Points (step, CKA) in pieces of one reference each.

    A published encoder becomes the reference, so that CKA begins anew at 1: a line across would
    show an encoder that moves back. A point at the step of a publication was measured before it.
    """
    pieces: dict[int, list[tuple[int, float]]] = {}
    for point in points:
        pieces.setdefault(sum(step < point[0] for step in published), []).append(point)
    return list(pieces.values())


def _draw_cka(axis, pieces: Sequence[Sequence[tuple[int, float]]], threshold) -> None:
    for piece in pieces:
        axis.plot(*zip(*piece, strict=True), marker=".", color=COLORS[0], lw=1.2)
    if threshold is not None:
        axis.axhline(threshold, color="#b03a2e", ls="--", lw=1)
        below = [point for piece in pieces for point in piece if point[1] < threshold]
        if below:
            axis.plot(*zip(*below, strict=True), "o", color="#b03a2e", ms=5)
        axis.annotate(f"threshold {threshold:g}", (0, threshold), (4, 2), fontsize=8,
                      textcoords="offset points", color="#b03a2e")  # fmt: skip
    axis.set_ylabel("CKA to the\nreference")


def _draw_losses(axis, losses, held_out) -> None:
    for number, (name, points) in enumerate(losses.items()):
        axis.plot(*zip(*points, strict=True), color=COLORS[number], lw=1.2, label=name)
        if points := held_out.get(name):
            axis.plot(*zip(*points, strict=True), color=COLORS[number], lw=0.9, ls="--",
                      marker="o", ms=4, mfc="white", label=f"{name}, validation")  # fmt: skip
    axis.set_ylabel("loss, nats")
    log_axis(axis)
    axis.legend(fontsize=8, frameon=False)


def log_axis(axis) -> None:
    """A logarithmic y axis with plain numbers; few between the powers of ten where many are."""
    axis.set_yscale("log")
    low, high = axis.get_ylim()
    shown = "12345678" if high < 5 * low else "1235" if high < 50 * low else "1"
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.yaxis.set_minor_formatter(
        lambda value, _: f"{value:.3g}" if f"{value:.0e}"[0] in shown else ""
    )
    axis.tick_params(axis="y", which="minor", labelsize=8)


Curve = tuple[str, list[int], list[float]]  # label, run steps, values


def logged_lr_curves(metrics: Sequence[Row]) -> list[Curve]:
    """Curves of (label, run steps, learning rates) as they were logged, one for the parts of a
    stage with equal rates."""
    rows_by_stage: dict[str, list[Row]] = {}
    for row in metrics:
        if "step" in row:
            rows_by_stage.setdefault(row["stage"], []).append(row)
    curves = []
    for stage, rows in rows_by_stage.items():
        parts_by_rates: dict[tuple[float, ...], list[str]] = {}
        for name in (key for key in rows[0] if key.startswith("lr_")):
            rates = tuple(row.get(name, math.nan) for row in rows)
            parts_by_rates.setdefault(rates, []).append(name.removeprefix("lr_"))
        steps = [row["steps"] for row in rows]
        for rates, parts in parts_by_rates.items():
            curves.append((f"{stage}: {', '.join(parts)}", steps, list(rates)))
    return curves


def planned_lr_curves(schedule: Schedule, events: Sequence[Row], points: int = 200) -> list[Curve]:
    """`logged_lr_curves` of a simulated run, from the ``schedule``; about ``points`` of a stage.

    The steps at which encoders are published show how many of the run's were each branch's;
    between two of them a branch's steps are spread evenly.
    """
    stages, curves = {s.name: s for s in schedule.stages}, []
    steps_before = {"pretrain": 0, "sft": 0}  # of the branch, in its stages so far
    for span in stage_spans(events):
        if span.name not in stages:  # it left the table when the run was resumed
            continue
        stage = stages[span.name]
        first, last = steps_before[span.branch], stage.steps - 1
        steps_before[span.branch] += stage.steps
        anchors = {0: span.start, last: span.stop}
        for event in events:
            if event["event"] == "published":
                pretrain = event["pretrain"]
                done = pretrain if span.branch == "pretrain" else event["steps"] - pretrain
                if 0 < done - first < last:
                    anchors[done - first] = event["steps"]
        count = min(points, stage.steps)
        stage_steps = {i * last // max(count - 1, 1) for i in range(count)}
        stage_steps = sorted(stage_steps | {min(stage.warmup_steps, last)})
        known = sorted(anchors)
        run_steps = np.interp(stage_steps, known, [anchors[step] for step in known])
        parts_by_peak: dict[float, list[str]] = {}
        for part, peak in stage.trains.items():
            parts_by_peak.setdefault(peak, []).append(part)
        for parts in parts_by_peak.values():
            lrs = [learning_rate(stage, parts[0], s) for s in stage_steps]
            label = f"{stage.name}: {', '.join(parts)}"
            curves.append((label, run_steps.round().astype(int).tolist(), lrs))
    return curves


def loss_curves(
    metrics: Sequence[Row], names: Mapping[str, str] = LOSSES
) -> tuple[dict[str, list[tuple[int, float]]], dict[str, list[tuple[int, float]]]]:
    """Points (run steps, loss) of training, and on the validation set, by the curve's name."""
    losses, held_out = {}, {}
    for branch, label in names.items():
        key = {"pretrain": "ctc", "sft": "nll"}[branch]
        rows = [m for m in metrics if m.get("branch") == branch]
        trained = [(m["steps"], m[key]) for m in rows if "step" in m and m.get(key) is not None]
        points = [
            (m["steps"], m["loss"])
            for m in rows
            if m["stage"].startswith("valid_") and m.get("loss") is not None
        ]
        if trained:
            losses[label] = trained
        if points:
            held_out[label] = points
    return losses, held_out


def plot_run(folder: Path) -> Path:
    """Write ``timeline.png`` into a run folder, from its events and metrics; returns its path."""
    path = folder / "timeline.png"
    title = f"{folder.name}: stages, encoder swaps, drift"
    plot_logs(read_events(folder), read_metrics(folder), path, title)
    return path


def plot_logs(
    events: Sequence[Row], metrics: Sequence[Row], path: Path, title: str, **options: str
) -> None:
    """`plot` what a run has logged."""
    cka = [(m["steps"], m["cka"]) for m in metrics if m.get("cka") is not None]
    threshold = next((m["cka_threshold"] for m in metrics if "cka_threshold" in m), None)
    losses, held_out = loss_curves(metrics)
    plot(
        events, path, title, cka=cka, threshold=threshold, lrs=logged_lr_curves(metrics),
        losses=losses, held_out=held_out, **options,
    )  # fmt: skip
