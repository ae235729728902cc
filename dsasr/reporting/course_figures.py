"""The report's figures of a run's course: timeline, metrics, errors, speed, each over training."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

from dsasr.evaluation.error_rate import FEWEST_FOR_INTERVAL
from dsasr.evaluation.hallucination import wilson
from dsasr.reporting.figures import (
    METRICS,
    band,
    colors,
    estimate_of,
    key_above,
    new,
    save,
    time_unit,
)
from dsasr.reporting.run_data import Row, RunData
from dsasr.tracking.timeline_plot import COLORS, log_axis, plot_logs


def timeline(run: RunData, path: Path) -> Path | None:
    """Both branches over the run's steps, with triggers, swaps, learning rates, CKA and losses."""
    if not any(e["event"] == "stage" for e in run.events):
        return None
    more = {"x_label": "optimizer steps, of each branch its own"} if len(run.jobs) > 1 else {}
    plot_logs(run.events, run.metrics, path, f"{run.name}: stages, encoder swaps, drift", **more)
    return path


HEALTH = (
    ("grad_norm", "gradient norm,\nbefore clipping", 1.0),
    ("audio_hours_per_hour", "speed, hours of\naudio an hour", 1.0),
    ("memory_bytes", "memory of a\nrank, GB", 1e-9),
)


def health(runs: Sequence[RunData], path: Path) -> Path | None:
    """Gradient norm, speed and memory by training time: solid the pretrain branch, dashed sft."""
    panels = [p for p in HEALTH if any(p[0] in m for run in runs for m in run.trained)]
    if not panels:
        return None
    unit, word = time_unit(runs)
    figure, axes = new(len(panels), 1, (8.6, 1.1 + 1.5 * len(panels)), sharex=True)
    for axis, (key, label, factor) in zip(axes[:, 0], panels, strict=True):
        for run, color in zip(runs, colors(runs), strict=True):
            for branch, style in (("pretrain", "-"), ("sft", "--")):
                points = [
                    (m["seconds"] / unit, factor * m[key])
                    for m in run.trained
                    if key in m and m["branch"] == branch
                ]
                if points:
                    axis.plot(*zip(*points, strict=True), style, color=color, lw=1.1)
            mark_joint(axis, run, unit, color)
        axis.set_ylabel(label, fontsize=9)
        if key == "grad_norm":
            log_axis(axis)
        else:
            axis.set_ylim(0, 1.05 * axis.get_ylim()[1])
    branches = ("pretrain branch", {"ls": "-"}), ("sft branch", {"ls": "--"})
    key_above(figure, runs, branches)
    axes[-1][0].set_xlim(0, 1.03 * max(run.train_seconds for run in runs) / unit)
    axes[-1][0].set_xlabel(f"training time, {word}")
    return save(figure, path)


def over_training(runs: Sequence[RunData], path: Path) -> Path | None:
    """NSE, PAI and CSAI by training time: solid the live encoder, dashed that of the sft branch."""
    runs = [run for run in runs if run.online]
    online = {run.name: run.online for run in runs}
    shown = [
        m for m in METRICS
        if any(math.isfinite(row.value(m[0])) for rows in online.values() for row in rows)
    ]  # fmt: skip
    if not shown:
        return None
    unit, word = time_unit(runs)
    figure, axes = new(1, len(shown), (3.9 * len(shown), 3.7))
    for axis, (key, label, title) in zip(axes[0], shown, strict=True):
        for run, color in zip(runs, colors(runs), strict=True):
            for branch, style in (("pretrain", "-"), ("sft", "--")):
                rows = [
                    row for row in online[run.name]
                    if row.encoder.branch == branch and math.isfinite(row.value(key))
                ]  # fmt: skip
                times = [row.encoder.seconds / unit for row in rows]
                values = [row.value(key) for row in rows]
                axis.plot(times, values, style, marker=".", color=color, lw=1.3)
                estimates = [estimate_of(row, key) for row in rows]
                known = [
                    (time, e.low, e.high)
                    for time, e in zip(times, estimates, strict=True)
                    if math.isfinite(e.low)
                ]
                band(axis, known, color)
            if any(math.isfinite(row.value(key)) for row in online[run.name]):
                mark_joint(axis, run, unit, color)
        axis.set_title(title, fontsize=10, loc="left")
        axis.set_xlabel(f"training time, {word}")
        axis.set_ylabel(label)
        axis.set_xlim(0, 1.03 * max(run.train_seconds for run in runs) / unit)
    branches = ("pretrain branch's encoder", {"ls": "-"}), ("sft branch's", {"ls": "--"})
    key_above(figure, runs, branches)
    return save(figure, path)


def mark_joint(axis, run: RunData, unit: float, color: str) -> None:
    starts = [
        e["seconds"] for e in run.events if e["event"] == "stage" and e["name"] == run.joint_stage
    ]
    if starts:
        axis.axvline(starts[0] / unit, color=color, lw=0.9, ls=":")


CURVES = (
    ("wer", "WER (words)", "-", "o"),
    ("cer", "CER (characters)", "--", "s"),
    ("mer", "MER (mixed)", ":", "^"),
)


def against_time(runs: Sequence[RunData], path: Path) -> Path | None:
    """Error rates and hallucinations on the validation set by training time.

    Each run has a color, or each rate of a single run.
    """
    scored = [r for r in runs if any("wer" in m or "cer" in m for m in r.validation)]
    if not scored:
        return None
    panels: list[tuple[str, Callable[[Row], dict[str, float]]]] = [
        ("error rate, %", lambda m: {n: 100 * m[k] for k, n, _, _ in CURVES if k in m}),
        ("hallucinated\nutterances, %", lambda m: _named(m, "flagged", "speech", 100)),
        ("text on non-speech,\ncharacters a minute",
         lambda m: _named(m, "characters_per_minute", "non-speech", 1)),
    ]  # fmt: skip
    panels = [p for p in panels if any(p[1](m) for r in scored for m in r.validation)]
    unit, word = time_unit(scored)
    figure, axes = new(len(panels), 1, (8.6, 1.5 + 1.7 * len(panels)), sharex=True)
    styles = {name: {"ls": style, "marker": mark} for _, name, style, mark in CURVES}
    if len(scored) == 1:
        colored = zip(styles.items(), COLORS, strict=False)
        styles = {name: {**style, "color": c} for (name, style), c in colored}
    for axis, (label, values) in zip(axes[:, 0], panels, strict=True):
        for run, color in zip(scored, colors(scored), strict=True):
            curves: dict[str, list[tuple[float, float]]] = {}
            for line in run.validation:
                for name, value in values(line).items():
                    if math.isfinite(value):
                        curves.setdefault(name, []).append((line["seconds"] / unit, value))
            for name, points in curves.items():
                style = {"color": color, "marker": "o", "ls": "-"} | styles.get(name, {})
                axis.plot(*zip(*points, strict=True), ms=4, lw=1.3, clip_on=False, **style)
                known = [
                    (line["seconds"] / unit, *ends)
                    for line in run.validation
                    if (ends := _ends(line, name))
                ]
                band(axis, known, style["color"])
            if curves:
                mark_joint(axis, run, unit, color)
        axis.set_ylabel(label, fontsize=9)
        top = max(1, axis.get_ylim()[1])
        axis.set_ylim(-0.03 * top, top)  # below 0, so that the axis does not hide a curve at 0
    drawn = {name for run in scored for line in run.validation for name in panels[0][1](line)}
    key_above(
        figure, scored, [(n, {**style, "ms": 4}) for n, style in styles.items() if n in drawn]
    )
    axes[-1][0].set_xlim(0, 1.03 * max(run.train_seconds for run in scored) / unit)
    axes[-1][0].set_xlabel(f"training time, {word}")
    return save(figure, path)


def _named(line: Row, key: str, name: str, factor: float) -> dict[str, float]:
    value = line.get(f"hallucination/{key}")
    return {} if value is None else {name: factor * value}


def _ends(line: Row, name: str) -> tuple[float, float] | None:
    """The interval's ends in percent at a curve's point, if enough utterances were evaluated."""
    for key, curve, _, _ in CURVES:
        if name == curve and f"{key}_low" in line:
            return 100 * line[f"{key}_low"], 100 * line[f"{key}_high"]
    share, count = line.get("hallucination/flagged"), line.get("hallucination/utterances", 0)
    if name == "speech" and share is not None and count >= FEWEST_FOR_INTERVAL:
        low, high = wilson(share * count, count)
        return 100 * low, 100 * high
    return None
