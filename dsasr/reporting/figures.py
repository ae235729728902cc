"""The report's figures as PNGs. Every axis names its unit.

A run without the data of a figure is left out of it; a figure without any run is not drawn.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dsasr.entropy_allocation.allocation_row import AllocationRow, Estimate
from dsasr.reporting.run_data import Row, RunData, allocation_rows, before_and_after
from dsasr.tracking.timeline_plot import COLORS, DPI, literal, lr_curves, plot
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


def _legend(axis) -> None:
    handles, labels = axis.get_legend_handles_labels()
    if labels:
        by_label = dict(zip(labels, handles, strict=True))
        axis.legend(by_label.values(), by_label.keys(), fontsize=8, frameon=False)


def _key(figure, runs: Sequence[RunData], styles: Sequence[tuple[str, dict[str, Any]]]) -> None:
    """A legend above the figure: a color per run, if several, and the styles and marks."""
    from matplotlib.lines import Line2D

    names = [(literal(r.name), {"color": c}) for r, c in zip(runs, _colors(runs), strict=True)]
    rows = [*(names if len(runs) > 1 else ()), *styles]
    plain = MUTE if len(runs) > 1 else COLORS[0]
    if any(run.joint_stage for run in runs):
        rows.append(("joint training begins", {"ls": ":", "lw": 0.9}))
    lines = [
        Line2D([], [], label=name, **{"color": plain, "lw": 1.3, **style}) for name, style in rows
    ]
    figure.legend(
        handles=lines, loc="outside upper left", ncols=min(len(lines), 5), fontsize=8, frameon=False
    )


def _colors(runs: Sequence[RunData]) -> list[str]:
    return [COLORS[i % len(COLORS)] for i in range(len(runs))]


# -- figures -----------------------------------------------------------------------------------


LOSSES = (("CTC, nats a label (pretrain)", "ctc"), ("transcript, nats a token (sft)", "nll"))


def timeline(run: RunData, path: Path) -> Path | None:
    """Both branches over the run's steps, with triggers, swaps, learning rates, CKA and losses."""
    if not any(e["event"] == "stage" for e in run.events):
        return None
    losses = {
        label: points
        for label, key in LOSSES
        if (points := [(m["steps"], m[key]) for m in run.metrics if key in m and "step" in m])
    }
    threshold = next((m["cka_threshold"] for m in run.drift), None)
    lrs = lr_curves(run.schedule, run.events) if run.schedule else ()
    cka = [(m["steps"], m["cka"]) for m in run.drift]
    title = f"{run.name}: stages, encoder swaps, drift"
    more = {"x_label": "optimizer steps, of each branch its own"} if len(run.jobs) > 1 else {}
    plot(run.events, path, title, cka=cka, threshold=threshold, lrs=lrs, losses=losses, **more)
    return path


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
        for run, color in zip(runs, _colors(runs), strict=True):
            drifted = [e for e in run.events if e["event"] == "drift" and "cka" in e]
            points = [(e["pretrain"], e["cka"]) for e in drifted]
            if points:
                axis.plot(
                    *zip(*points, strict=True), ".-", color=color, lw=1.3, label=literal(run.name)
                )
            below = [
                (e["pretrain"], e["cka"])
                for e in run.events
                if e["event"] == "published" and e.get("cka") is not None
            ]
            if below:
                axis.plot(*zip(*below, strict=True), "o", ms=7, mfc="none", mec=color)
        threshold = next((m["cka_threshold"] for run in runs for m in run.drift), None)
        if threshold is not None:
            axis.axhline(threshold, color=WARN, ls="--", lw=1, label=f"threshold {threshold:g}")
        axis.set_title("while pretraining (circles: published)", fontsize=10, loc="left")
        axis.set_xlabel("pretraining steps")
        axis.set_ylabel("CKA to the reference")
        axis.xaxis.get_major_locator().set_params(integer=True)
        _legend(axis)
    if panels[1]:
        axis = next(panel)
        for run, color in zip(runs, _colors(runs), strict=True):
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
        _legend(axis)
    return save(figure, path)


METRICS = (
    ("nse", "NSE, 0 to 1", "spread: normalized spectral entropy"),
    ("pai", "PAI, nats a frame", "phonemes: accessible information"),
    ("csai", "CSAI, nats a frame", "words beyond phonemes"),
)


def over_training(runs: Sequence[RunData], path: Path) -> Path | None:
    """NSE, PAI and CSAI by training time: solid the live encoder, dashed that of the sft branch."""
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
        for run, color in zip(runs, _colors(runs), strict=True):
            for branch, style in (("pretrain", "-"), ("sft", "--")):
                rows = [
                    row for row in online[run.name]
                    if row.encoder.branch == branch and math.isfinite(row.value(key))
                ]  # fmt: skip
                times = [row.encoder.seconds / unit for row in rows]
                values = [row.value(key) for row in rows]
                axis.plot(times, values, style, marker=".", color=color, lw=1.3)
                estimates = [_estimate(row, key) for row in rows]
                if any(math.isfinite(e.low) for e in estimates):
                    low, high = [e.low for e in estimates], [e.high for e in estimates]
                    axis.fill_between(times, low, high, color=color, alpha=0.12, lw=0)
            if any(math.isfinite(row.value(key)) for row in online[run.name]):
                _mark_joint(axis, run, unit, color)
        axis.set_title(title, fontsize=10, loc="left")
        axis.set_xlabel(f"training time, {word}")
        axis.set_ylabel(label)
        axis.set_xlim(0, 1.03 * max(run.train_seconds for run in runs) / unit)
    shown_runs = [run for run in runs if online[run.name]]
    branches = ("pretrain branch's encoder", {"ls": "-"}), ("sft branch's", {"ls": "--"})
    _key(figure, shown_runs, branches)
    return save(figure, path)


def _mark_joint(axis, run: RunData, unit: float, color: str) -> None:
    starts = [
        e["seconds"] for e in run.events if e["event"] == "stage" and e["name"] == run.joint_stage
    ]
    if starts:
        axis.axvline(starts[0] / unit, color=color, lw=0.9, ls=":")


def joint(runs: Sequence[RunData], path: Path) -> Path | None:
    """NSE, PAI, CSAI of the encoder before and after joint training (the paper's figure 1)."""
    pairs = [(run.name, pair) for run in runs if (pair := before_and_after(run))]
    if not pairs:
        return None
    figure, axes = new(1, 3, (9.6, 3.5))
    for axis, (key, label, title) in zip(axes[0], METRICS, strict=True):
        for side, color, shift in (("before", "#9db8d2", -0.2), ("after", COLORS[0], 0.2)):
            rows = [pair[0 if shift < 0 else 1] for _, pair in pairs]
            estimates = [_estimate(row, key) for row in rows]
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


def _estimate(row: AllocationRow, key: str) -> Estimate:
    """The estimate of a metric; all NaN, and so not drawn, where it has none."""
    return (None if key == "nse" else getattr(row, key)) or Estimate()


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
        estimates = [_estimate(row, key) for row in rows]
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
    shares = [_estimate(row, key).share for row in rows for key in ("pai", "csai")]
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
        for run, color in zip(runs, _colors(runs), strict=True):
            curves: dict[str, list[tuple[float, float]]] = {}
            for line in run.validation:
                for name, value in values(line).items():
                    if math.isfinite(value):
                        curves.setdefault(name, []).append((line["seconds"] / unit, value))
            for name, points in curves.items():
                style = {"color": color, "marker": "o", "ls": "-"} | styles.get(name, {})
                axis.plot(*zip(*points, strict=True), ms=4, lw=1.3, clip_on=False, **style)
            if curves:
                _mark_joint(axis, run, unit, color)
        axis.set_ylabel(label, fontsize=9)
        axis.set_ylim(0, max(1, axis.get_ylim()[1]))
    drawn = {name for run in scored for line in run.validation for name in panels[0][1](line)}
    _key(figure, scored, [(n, {**style, "ms": 4}) for n, style in styles.items() if n in drawn])
    axes[-1][0].set_xlim(0, 1.03 * max(run.train_seconds for run in scored) / unit)
    axes[-1][0].set_xlabel(f"training time, {word}")
    return save(figure, path)


def _named(line: Row, key: str, name: str, factor: float) -> dict[str, float]:
    value = line.get(f"hallucination/{key}")
    return {} if value is None else {name: factor * value}
