"""The report's figures as PNGs. Every axis names its unit.

A run without the data of a figure is left out of it; a figure without any run is not drawn.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dsasr.entropy_allocation.allocation_row import AllocationRow, Estimate
from dsasr.evaluation.error_rate import FEWEST_FOR_INTERVAL
from dsasr.reporting.run_data import RunData, allocation_rows, before_and_after
from dsasr.tracking.timeline_plot import COLORS, DPI, literal, split_after
from dsasr.utils.io import atomic_path

INK, SOFT, WARN, MUTE = "#2b2b2b", "#e9e9e9", "#b03a2e", "#777777"
PHONETIC, SEMANTIC, LANGUAGE = COLORS[0], COLORS[3], COLORS[1]


def new(rows: int = 1, columns: int = 1, size: tuple[float, float] = (9, 3.2), **options):
    """A figure and its axes [rows, columns], drawn without a display."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(
        rows, columns, figsize=size, squeeze=False, layout="constrained", **options
    )
    for axis in axes.flat:
        _plain(axis)
    return figure, axes


def _plain(axis) -> None:
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    axis.yaxis.grid(True, color=SOFT)
    axis.set_axisbelow(True)
    axis.tick_params(labelsize=9)
    axis.ticklabel_format(useOffset=False)


def save(figure, path: Path) -> Path:
    from matplotlib import pyplot as plt

    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=DPI, format="png")
    plt.close(figure)
    return path


def time_unit(runs: Sequence[RunData]) -> tuple[float, str]:
    """The seconds in one unit of a time axis, and the unit's name."""
    longest = max((run.train_seconds for run in runs), default=0.0)
    return (3600.0, "hours") if longest > 2 * 3600 else (60.0, "minutes")


def legend(axis) -> None:
    handles, labels = axis.get_legend_handles_labels()
    if labels:
        by_label = dict(zip(labels, handles, strict=True))
        axis.legend(by_label.values(), by_label.keys(), fontsize=8, frameon=False)


def key_above(
    figure, runs: Sequence[RunData], styles: Sequence[tuple[str, dict[str, Any]]]
) -> None:
    """A legend above the figure: a color per run, if several, and the styles and marks."""
    from matplotlib.lines import Line2D

    names = [(r.name, {"color": c}) for r, c in zip(runs, colors(runs), strict=True)]
    rows = [*(names if len(runs) > 1 else ()), *styles]
    plain = MUTE if len(runs) > 1 else COLORS[0]
    if any(e["event"] == "stage" and e["name"] == run.joint_stage
           for run in runs for e in run.events):  # fmt: skip
        rows.append(("joint training begins", {"ls": ":", "lw": 0.9}))
    lines = [
        Line2D([], [], label=literal(name), **{"color": plain, "lw": 1.3, **style})
        for name, style in rows
    ]
    figure.legend(
        handles=lines,
        loc="outside upper left",
        ncols=min(len(lines), 5, int(figure.get_figwidth() / 1.7)),
        fontsize=8,
        frameon=False,
    )


def band(axis, points: Sequence[tuple[float, float, float]], color: str) -> None:
    """Shade intervals (x, low, high); a single one has no area, and becomes an error bar."""
    if len(points) == 1:
        [(x, low, high)] = points
        middle, half = (low + high) / 2, (high - low) / 2
        axis.errorbar(x, middle, half, fmt="none", ecolor=color, elinewidth=1, capsize=3)
    elif points:
        axis.fill_between(*zip(*points, strict=True), color=color, alpha=0.12, lw=0)


def colors(runs: Sequence[RunData]) -> list[str]:
    return [COLORS[i % len(COLORS)] for i in range(len(runs))]


def cka(runs: Sequence[RunData], path: Path) -> Path | None:
    """Left: the live encoder against its reference; right: the sft branch's encoder through joint
    training, against the one at its start."""
    through = {
        run.name: [
            (row.encoder.steps, row.cka_to_reference)
            for row in run.online
            if math.isfinite(row.cka_to_reference) and row.encoder.stage == run.joint_stage
        ]
        for run in runs
    }
    panels = [any(run.drift for run in runs), any(through.values())]
    if not any(panels):
        return None
    figure, axes = new(1, sum(panels), (4.6 * sum(panels) + 1, 3.2))
    panel = iter(axes[0])
    if panels[0]:
        axis = next(panel)
        for run, color in zip(runs, colors(runs), strict=True):
            _drift_and_published(axis, run, color)
        threshold = next((m["cka_threshold"] for run in runs for m in run.drift), None)
        if threshold is not None:
            axis.axhline(threshold, color=WARN, ls="--", lw=1, label=f"threshold {threshold:g}")
        title = "while pretraining (circles: published, on the axis unmeasured)"
        axis.set_title(title, fontsize=9, loc="left")
        axis.set_xlabel("pretraining steps")
        axis.set_ylabel("CKA to the reference")
        axis.xaxis.get_major_locator().set_params(integer=True)
        legend(axis)
    if panels[1]:
        axis = next(panel)
        for run, color in zip(runs, colors(runs), strict=True):
            points = through[run.name]
            if points:
                start = next(e["steps"] for e in run.events if e.get("name") == run.joint_stage)
                steps = [0, *(s - start for s, _ in points)]
                values = [1.0, *(v for _, v in points)]
                axis.plot(steps, values, ".-", color=color, lw=1.3, label=literal(run.name))
        # An encoder that hardly changed must look like it.
        low = min(0.99, axis.get_ylim()[0])
        axis.set_ylim(low, 1 + 0.03 * (1 - low))
        axis.set_title("through joint training", fontsize=10, loc="left")
        axis.set_xlabel("joint steps")
        axis.set_ylabel("CKA to the encoder before it")
        axis.xaxis.get_major_locator().set_params(integer=True)
        legend(axis)
    return save(figure, path)


def _drift_and_published(axis, run: RunData, color: str) -> None:
    """CKA by pretraining step, a line for each reference, and the published encoders."""
    drifted = [e for e in run.events if e["event"] == "drift" and "cka" in e]
    published = [e for e in run.events if e["event"] == "published"]
    points = [(e["pretrain"], e["cka"]) for e in drifted]
    for piece in split_after(points, [e["pretrain"] for e in published]):
        axis.plot(*zip(*piece, strict=True), ".-", color=color, lw=1.3, label=literal(run.name))
    circle = {"ls": "", "marker": "o", "ms": 7, "mfc": "none", "mec": color}
    measured = [(e["pretrain"], e["cka"]) for e in published if e.get("cka") is not None]
    if measured:
        axis.plot(*zip(*measured, strict=True), **circle)
    # The encoder at pretraining's end is published without a measurement.
    rest = [e["pretrain"] for e in published if e.get("cka") is None]
    if rest:
        at_foot = axis.get_xaxis_transform()
        axis.plot(rest, [0] * len(rest), transform=at_foot, clip_on=False, **circle)


METRICS = (
    ("nse", "NSE, at most 1", "spread: normalized spectral entropy"),
    ("pai", "PAI, nats a frame", "phonemes: accessible information"),
    ("csai", "CSAI, nats a frame", "words beyond phonemes"),
)


def joint(runs: Sequence[RunData], path: Path) -> Path | None:
    """NSE, PAI, CSAI of the encoder before and after joint training (the paper's figure 1)."""
    pairs = [(run.name, pair) for run in runs if (pair := before_and_after(run))]
    if not pairs:
        return None
    figure, axes = new(1, 3, (9.6, 3.5))
    for axis, (key, label, title) in zip(axes[0], METRICS, strict=True):
        for side, color, shift in (("before", "#9db8d2", -0.2), ("after", COLORS[0], 0.2)):
            rows = [pair[0 if shift < 0 else 1] for _, pair in pairs]
            estimates = [estimate_of(row, key) for row in rows]
            notes = [_not_detected(e) for e in estimates]
            values = [math.nan if n else r.value(key) for n, r in zip(notes, rows, strict=True)]
            x = [i + shift for i in range(len(pairs))]
            bars = axis.bar(x, values, 0.36, color=color, label=f"{side} joint training")
            for position, text in zip(x, notes, strict=True):
                axis.annotate(text, (position, 0), (0, 3), rotation=90, fontsize=7, color=MUTE,
                              textcoords="offset points", ha="center")  # fmt: skip
            if any(math.isfinite(e.low) for e in estimates):
                _whiskers(axis, x, values, estimates)
                axis.margins(y=0.15)
            else:
                upright = {"rotation": 90, "fontsize": 7} if len(pairs) > 2 else {"fontsize": 8}
                axis.bar_label(bars, fmt="%.3f", padding=2, **upright)
        if axis.get_ylim()[0] < 0:
            axis.axhline(0, color=INK, lw=0.8)
        names = [literal(name) for name, _ in pairs]
        slant = {"rotation": 35, "ha": "right"} if sum(map(len, names)) > 26 else {}
        axis.set_xticks(range(len(pairs)), names, fontsize=9, **slant)
        # Margins around a single pair, so that its bars do not fill the figure.
        axis.set_xlim(*((-0.6, len(pairs) - 0.4) if len(pairs) > 1 else (-0.9, 0.9)))
        axis.set_title(title, fontsize=10, loc="left")
        axis.set_ylabel(label)
    axes[0][0].set_ylim(0, 1.05)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=2, fontsize=8, frameon=False)
    return save(figure, path)


def estimate_of(row: AllocationRow, key: str) -> Estimate:
    """The estimate of a metric; all NaN, and so not drawn, where it has none.

    One over fewer than `FEWEST_FOR_INTERVAL` utterances has no interval.
    """
    estimate = (None if key == "nse" else getattr(row, key)) or Estimate()
    if 0 < estimate.utterances < FEWEST_FOR_INTERVAL:
        return replace(estimate, low=math.nan, high=math.nan)
    return estimate


def _not_detected(estimate: Estimate, unit: str = "") -> str:
    """The label of an estimate that is not detected; "" if it is, or if there is none."""
    if estimate.detected or not math.isfinite(estimate.low):
        return ""
    limit = estimate.detection_limit
    return f"none found (< {limit:.2g}{unit})" if math.isfinite(limit) else "none found"


def _whiskers(axis, x, values, estimates: Sequence[Estimate]) -> None:
    low = [max(v - e.low, 0) for v, e in zip(values, estimates, strict=True)]
    high = [max(e.high - v, 0) for v, e in zip(values, estimates, strict=True)]
    axis.errorbar(x, values, [low, high], fmt="none", ecolor=INK, elinewidth=1, capsize=3)


def allocation(runs: Sequence[RunData], path: Path) -> Path | None:
    """Per checkpoint: the shares of PAI and CSAI, and the transcript's entropy with and without
    the audio."""
    rows = [row for run in runs for row in allocation_rows(run, prefix=len(runs) > 1)]
    if not rows:
        return None
    height = 1.3 + 0.42 * len(rows)
    figure, (axes,) = new(1, 2, (10.5, height), sharey=True)
    left, right = axes
    for key, shift, color, label in (
        ("pai", -0.18, PHONETIC, "phonemes: PAI of H(P)"),
        ("csai", 0.18, SEMANTIC, "words beyond phonemes: CSAI of H(S|P)"),
    ):
        estimates = [estimate_of(row, key) for row in rows]
        bars = [
            (i + shift, 0.0 if note else 100 * e.share, note)
            for i, e in enumerate(estimates)
            if (note := _not_detected(e, " nats a frame")) or math.isfinite(e.share)
        ]
        if bars:
            y, values, _ = zip(*bars, strict=True)
            left.barh(y, values, 0.34, color=color, label=label)
        for position, share, note in bars:
            # Right of the axis also where the estimate is negative: names are on its left.
            left.annotate(note or _percent(share), (max(share, 0), position), (3, 0), fontsize=8,
                          textcoords="offset points", va="center")  # fmt: skip
    left.set_xlabel("share of the entropy that the encoder's frames resolve, %")
    shares = [estimate_of(row, key).share for row in rows for key in ("pai", "csai")]
    least = min((100 * share for share in shares if math.isfinite(share)), default=0)
    left.set_xlim(min(0, 1.2 * least), 112)
    left.set_xticks(range(0, 101, 20))
    with_llm = [(i, r.llm) for i, r in enumerate(rows) if r.llm and math.isfinite(r.llm.resolved)]
    if with_llm:
        y = [i for i, _ in with_llm]
        # Audio that misleads resolves nothing: then H₁ alone is drawn.
        audio = [max(0.0, llm.resolved) for _, llm in with_llm]
        rest = [llm.nll_with_audio for _, llm in with_llm]
        right.barh(y, audio, 0.6, color=PHONETIC, label="resolved by the audio: H₀ − H₁")
        right.barh(y, rest, 0.6, left=audio, color=LANGUAGE, label="left open: H₁")
    right.set_xlabel("entropy of the transcript, nats a token")
    left.set_yticks(range(len(rows)), [literal(r.encoder.name) for r in rows], fontsize=9)
    left.invert_yaxis()
    for axis in axes:
        axis.xaxis.grid(True, color=SOFT)
        axis.yaxis.grid(False)
        handles, _ = axis.get_legend_handles_labels()
        if handles:
            axis.legend(fontsize=8, frameon=False, loc="lower left", bbox_to_anchor=(0, 1.0))
    return save(figure, path)


def _percent(share: float) -> str:
    """``12%``; ``3.4%`` below ten, where whole numbers would hide a change."""
    digits = 1 if 0.05 <= abs(share) < 10 else 0
    return f"{share:.{digits}f}%".replace("-", "−") if abs(share) >= 0.05 else "0%"
