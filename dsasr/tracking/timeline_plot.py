"""The plot of a run's timeline: stages of both branches, swaps, drift, learning rates, losses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dsasr.stages import Schedule, learning_rate
from dsasr.tracking.run_log import Row, read_events, read_metrics
from dsasr.utils.io import atomic_path

COLORS = ("#3b6ea5", "#d08c2f", "#4f9d69", "#a5556f", "#7a6bb0", "#8a8a8a", "#6b4a2b")
LINES = ("-", "--", ":", "-.")
DPI = 140


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
    x_label: str = "optimizer steps of the run, both branches counted",
) -> None:
    """Write a PNG of both branches over the run's steps with published snapshots and swaps.

    Panels below it, each where it has data: ``lrs``, curves of (label, steps, learning rates);
    ``cka``, points of (step, CKA) with the ``threshold``; ``losses``, name → (step, value).
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
        _draw_cka(axis_of["cka"], cka, threshold)
    if losses:
        _draw_losses(axis_of["losses"], losses)
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
    schedule: Schedule, events: Sequence[Row], points: int = 200
) -> list[tuple[str, list[int], list[float]]]:
    """Curves of (label, run steps, learning rates), one for the parts of a stage with equal rates.

    A stage's own steps are spread evenly over its span; about ``points`` of them are drawn.
    """
    stages, curves = {s.name: s for s in schedule.stages}, []
    for span in stage_spans(events):
        if span.name not in stages:  # it left the table when the run was resumed
            continue
        stage = stages[span.name]
        count, last = min(points, stage.steps), stage.steps - 1
        stage_steps = {i * last // max(count - 1, 1) for i in range(count)}
        stage_steps = sorted(stage_steps | {min(stage.warmup_steps, last)})
        run_steps_each = (span.stop - span.start) / max(last, 1)
        run_steps = [round(span.start + s * run_steps_each) for s in stage_steps]
        parts_by_peak: dict[float, list[str]] = {}
        for part, peak in stage.trains.items():
            parts_by_peak.setdefault(peak, []).append(part)
        for parts in parts_by_peak.values():
            lrs = [learning_rate(stage, parts[0], s) for s in stage_steps]
            curves.append((f"{stage.name}: {', '.join(parts)}", run_steps, lrs))
    return curves


def plot_run(folder: Path) -> Path:
    """Write ``timeline.png`` into a run folder, from its events and metrics; returns its path."""
    events, metrics = read_events(folder), read_metrics(folder)
    cka = [(m["steps"], m["cka"]) for m in metrics if m.get("cka") is not None]
    threshold = next((m["cka_threshold"] for m in metrics if "cka_threshold" in m), None)
    trained = [m for m in metrics if "step" in m]  # not what was measured on held-out data
    losses = {
        label: points
        for label, key in (("CTC (pretrain)", "ctc"), ("transcript (sft)", "nll"))
        if (points := [(m["steps"], m[key]) for m in trained if m.get(key) is not None])
    }
    path = folder / "timeline.png"
    title = f"{folder.name}: stages, encoder swaps, drift"
    plot(events, path, title, cka=cka, threshold=threshold, losses=losses)
    return path
