"""The report's pictures: from plain rows to PNGs. Every axis says its unit.

A run that holds nothing for a picture is left out of it; a picture without any run is not drawn.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dsasr.reporting.run_data import Row, RunData, allocation_rows, before_and_after
from dsasr.tracking.timeline_plot import COLORS, DPI, lr_curves, plot
from dsasr.utils.io import atomic_path

INK, SOFT, WARN, MUTE = "#2b2b2b", "#e9e9e9", "#b03a2e", "#777777"
PHONETIC, SEMANTIC, LANGUAGE = COLORS[0], COLORS[3], COLORS[1]


def new(rows: int = 1, columns: int = 1, size: tuple[float, float] = (9, 3.2), **given):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(
        rows, columns, figsize=size, squeeze=False, layout="constrained", **given
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


def clocked(runs: Sequence[RunData]) -> tuple[float, str]:
    """Seconds to one unit of a time axis, and its name."""
    longest = max((run.longest for run in runs), default=0.0)
    return (3600.0, "hours") if longest > 2 * 3600 else (60.0, "minutes")


def _legend(axis, **given) -> None:
    handles, labels = axis.get_legend_handles_labels()
    if labels:
        kept = dict(zip(labels, handles, strict=True))
        axis.legend(kept.values(), kept.keys(), fontsize=8, frameon=False, **given)


def _key(figure, runs: Sequence[RunData], styles: Sequence[tuple[str, dict[str, Any]]]) -> None:
    """A legend above the picture: a color per run, if several, and what styles and marks mean."""
    from matplotlib.lines import Line2D

    names = [(r.name, {"color": c}) for r, c in zip(runs, _colors(runs), strict=True)]
    rows = [*(names if len(runs) > 1 else ()), *styles]
    plain = MUTE if len(runs) > 1 else COLORS[0]
    if any(run.joint for run in runs):
        rows.append(("joint training begins", {"ls": ":", "lw": 0.9}))
    lines = [Line2D([], [], label=name, **{"color": plain, "lw": 1.3, **how}) for name, how in rows]
    figure.legend(
        handles=lines, loc="outside upper left", ncols=min(len(lines), 5), fontsize=8, frameon=False
    )


def _colors(runs: Sequence[RunData]) -> list[str]:
    return [COLORS[i % len(COLORS)] for i in range(len(runs))]


# -- pictures ----------------------------------------------------------------------------------


LOSSES = (("CTC, nats a label (pretrain)", "ctc"), ("transcript, nats a token (sft)", "nll"))


def timeline(run: RunData, path: Path) -> Path | None:
    """Both branches over the run's steps, with triggers, swaps, rates, CKA and losses."""
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
    title = f"{run.name}: stages, encoders taken, drift"
    more = {"x_label": "optimizer steps, of each branch its own"} if len(run.jobs) > 1 else {}
    plot(run.events, path, title, cka=cka, threshold=threshold, lrs=lrs, losses=losses, **more)
    return path


def cka(runs: Sequence[RunData], path: Path) -> Path | None:
    """Left: the live encoder against its reference; right: the sft branch's encoder over its
    stages that train it, against the one that they began with."""
    through = {
        run.name: [
            (m["steps"], m["cka_to_stage_start"])
            for m in run.looks
            if "cka_to_stage_start" in m and m["stage"] == f"allocation_{run.joint}"
        ]
        for run in runs
    }
    panels = [any(run.drift for run in runs), any(through.values())]
    if not any(panels):
        return None
    figure, axes = new(1, sum(panels), (4.6 * sum(panels) + 1, 3.2))
    held = iter(axes[0])
    if panels[0]:
        axis = next(held)
        for run, color in zip(runs, _colors(runs), strict=True):
            drifted = [e for e in run.events if e["event"] == "drift" and "cka" in e]
            points = [(e["pretrain"], e["cka"]) for e in drifted]
            if points:
                axis.plot(*zip(*points, strict=True), ".-", color=color, lw=1.3, label=run.name)
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
        axis = next(held)
        for run, color in zip(runs, _colors(runs), strict=True):
            points = through[run.name]
            if points:
                start = next(e["steps"] for e in run.events if e.get("name") == run.joint)
                steps = [0, *(s - start for s, _ in points)]
                values = [1.0, *(v for _, v in points)]
                axis.plot(steps, values, ".-", color=color, lw=1.3, label=run.name)
        # An encoder that hardly moved is to look like it.
        low = min(0.99, axis.get_ylim()[0])
        axis.set_ylim(low, 1 + 0.03 * (1 - low))
        axis.set_title("through joint training", fontsize=10, loc="left")
        axis.set_xlabel("joint steps")
        axis.set_ylabel("CKA to the encoder before it")
        axis.xaxis.get_major_locator().set_params(integer=True)
        _legend(axis)
    return save(figure, path)


ENDS = ("low", "high")
METRICS = (
    ("nse", "NSE, 0 to 1", "spread: normalized spectral entropy"),
    ("pai", "PAI, nats a frame", "phonemes: accessible information"),
    ("csai", "CSAI, nats a frame", "words beyond phonemes"),
)


def over_training(runs: Sequence[RunData], path: Path) -> Path | None:
    """NSE, PAI and CSAI by training time: solid the live encoder, dashed that of the sft branch."""
    shown = [m for m in METRICS if any(m[0] in look for run in runs for look in run.looks)]
    if not shown:
        return None
    unit, word = clocked(runs)
    figure, axes = new(1, len(shown), (3.9 * len(shown), 3.7))
    for axis, (key, label, title) in zip(axes[0], shown, strict=True):
        for run, color in zip(runs, _colors(runs), strict=True):
            for branch, style in (("pretrain", "-"), ("sft", "--")):
                points = [m for m in run.looks if m["branch"] == branch and key in m]
                times = [m["seconds"] / unit for m in points]
                axis.plot(times, [m[key] for m in points], style, marker=".", color=color, lw=1.3)
                if any(f"{key}_low" in m for m in points):
                    low, high = ([_of(m, f"{key}_{end}") for m in points] for end in ENDS)
                    axis.fill_between(times, low, high, color=color, alpha=0.12, lw=0)
            if any(key in m for m in run.looks):
                _mark_joint(axis, run, unit, color)
        axis.set_title(title, fontsize=10, loc="left")
        axis.set_xlabel(f"training time, {word}")
        axis.set_ylabel(label)
        axis.set_xlim(0, 1.03 * max(run.longest for run in runs) / unit)
    shown_runs = [run for run in runs if run.looks]
    branches = ("pretrain branch's encoder", {"ls": "-"}), ("sft branch's", {"ls": "--"})
    _key(figure, shown_runs, branches)
    return save(figure, path)


def _mark_joint(axis, run: RunData, unit: float, color: str) -> None:
    begun = [e["seconds"] for e in run.events if e["event"] == "stage" and e["name"] == run.joint]
    if begun:
        axis.axvline(begun[0] / unit, color=color, lw=0.9, ls=":")


def joint(runs: Sequence[RunData], path: Path) -> Path | None:
    """NSE, PAI, CSAI of the encoder before and after joint training (the paper's figure 1)."""
    pairs = [(run.name, found) for run in runs if (found := before_and_after(run))]
    if not pairs:
        return None
    figure, axes = new(1, 3, (9.6, 3.5))
    for axis, (key, label, title) in zip(axes[0], METRICS, strict=True):
        for side, color, shift in (("before", "#9db8d2", -0.2), ("after", COLORS[0], 0.2)):
            rows = [pair[0 if shift < 0 else 1] for _, pair in pairs]
            nothing = [_none_found(row, key) for row in rows]
            values = [math.nan if n else _of(r, key) for n, r in zip(nothing, rows, strict=True)]
            places = [i + shift for i in range(len(pairs))]
            bars = axis.bar(places, values, 0.36, color=color, label=f"{side} joint training")
            for place, text in zip(places, nothing, strict=True):
                axis.annotate(text, (place, 0), (0, 3), rotation=90, fontsize=7, color=MUTE,
                              textcoords="offset points", ha="center")  # fmt: skip
            if any(f"{key}_low" in row for row in rows):
                _whiskers(axis, places, values, rows, key)
                axis.margins(y=0.15)
            else:
                upright = {"rotation": 90, "fontsize": 7} if len(pairs) > 2 else {"fontsize": 8}
                axis.bar_label(bars, fmt="%.3f", padding=2, **upright)
        if axis.get_ylim()[0] < 0:
            axis.axhline(0, color=INK, lw=0.8)
        names = [name for name, _ in pairs]
        slant = {"rotation": 35, "ha": "right"} if sum(map(len, names)) > 26 else {}
        axis.set_xticks(range(len(pairs)), names, fontsize=9, **slant)
        # Room beside a lone pair, so that its bars do not fill the picture.
        axis.set_xlim(*((-0.6, len(pairs) - 0.4) if len(pairs) > 1 else (-0.9, 0.9)))
        axis.set_title(title, fontsize=10, loc="left")
        axis.set_ylabel(label)
    axes[0][0].set_ylim(0, 1.05)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=2, fontsize=8, frameon=False)
    return save(figure, path)


def _of(row: Row, key: str) -> float:
    """NaN for what was not measured, which no picture shows."""
    value = row.get(key)
    return math.nan if value is None else value


def _none_found(row: Row, key: str, unit: str = "") -> str:
    """What a picture says of an estimate that cannot be told from none; "" if it can."""
    if row.get(f"{key}_found", True):
        return ""
    limit = row.get(f"{key}_limit")
    return "none found" if limit is None else f"none found (< {limit:.2g}{unit})"


def _whiskers(axis, places, values, rows: Sequence[Row], key: str) -> None:
    low = [max(v - _of(r, f"{key}_low"), 0) for v, r in zip(values, rows, strict=True)]
    high = [max(_of(r, f"{key}_high") - v, 0) for v, r in zip(values, rows, strict=True)]
    axis.errorbar(places, values, [low, high], fmt="none", ecolor=INK, elinewidth=1, capsize=3)


def allocation(runs: Sequence[RunData], path: Path) -> Path | None:
    """Per checkpoint: what a linear reader finds at the encoder's output, and the transcript's
    entropy with and without the audio."""
    rows = [bar for run in runs for bar in allocation_rows(run, prefix=len(runs) > 1)]
    if not rows:
        return None
    height = 1.3 + 0.42 * len(rows)
    figure, (axes,) = new(1, 2, (10.5, height), sharey=True)
    places = range(len(rows))
    left, right = axes
    for key, shift, color, label in (
        ("pai", -0.18, PHONETIC, "phonemes: PAI of H(P)"),
        ("csai", 0.18, SEMANTIC, "words beyond phonemes: CSAI of H(S|P)"),
    ):
        found = [
            (i + shift, 0.0 if nothing else 100 * r[f"{key}_share"], nothing)
            for i, r in enumerate(rows)
            if (nothing := _none_found(r, key, " nats a frame"))
            or r.get(f"{key}_share") is not None
        ]
        if found:
            at, values, _ = zip(*found, strict=True)
            left.barh(at, values, 0.34, color=color, label=label)
        for place, share, nothing in found:
            # Right of the axis also where the estimate is negative: left are the names.
            left.annotate(nothing or _percent(share), (max(share, 0), place), (3, 0), fontsize=8,
                          textcoords="offset points", va="center")  # fmt: skip
    left.set_xlabel("share of the entropy that the encoder's frames resolve, %")
    least = min(
        (100 * r[k] for r in rows for k in ("pai_share", "csai_share") if r.get(k)), default=0
    )
    left.set_xlim(min(0, 1.2 * least), 112)
    left.set_xticks(range(0, 101, 20))
    heard = [(i, r) for i, r in enumerate(rows) if r.get("nll_without_audio") is not None]
    if heard:
        at = [i for i, _ in heard]
        # Audio that misleads resolves nothing: then H₁ alone is drawn.
        audio = [max(0.0, r["nll_without_audio"] - r["nll_with_audio"]) for _, r in heard]
        rest = [r["nll_with_audio"] for _, r in heard]
        right.barh(at, audio, 0.6, color=PHONETIC, label="resolved by the audio: H₀ − H₁")
        right.barh(at, rest, 0.6, left=audio, color=LANGUAGE, label="left open: H₁")
    right.set_xlabel("entropy of the transcript, nats a token")
    left.set_yticks(places, [r["name"] for r in rows], fontsize=9)
    left.invert_yaxis()
    for axis in axes:
        axis.xaxis.grid(True, color=SOFT)
        axis.yaxis.grid(False)
        handles, _ = axis.get_legend_handles_labels()
        if handles:
            axis.legend(fontsize=8, frameon=False, loc="lower left", bbox_to_anchor=(0, 1.0))
    return save(figure, path)


def _percent(share: float) -> str:
    """``12%``; ``3.4%`` below ten, where whole numbers would hide what moves."""
    digits = 1 if 0.05 <= abs(share) < 10 else 0
    return f"{share:.{digits}f}%".replace("-", "−") if abs(share) >= 0.05 else "0%"


CURVES = (
    ("wer", "WER (words)", "-", "o"),
    ("cer", "CER (characters)", "--", "s"),
    ("mer", "MER (mixed)", ":", "^"),
)


def against_time(runs: Sequence[RunData], path: Path) -> Path | None:
    """Error rates and hallucinations on the validation set by training time.

    Colors tell runs apart, or the rates of a single run.
    """
    scored = [r for r in runs if any("wer" in m or "cer" in m for m in r.valid)]
    if not scored:
        return None
    panels: list[tuple[str, Callable[[Row], dict[str, float]]]] = [
        ("error rate, %", lambda m: {n: 100 * _of(m, k) for k, n, _, _ in CURVES if k in m}),
        ("hallucinated\nutterances, %", lambda m: _named(m, "flagged", "speech", 100)),
        ("text on non-speech,\ncharacters a minute",
         lambda m: _named(m, "characters_per_minute", "non-speech", 1)),
    ]  # fmt: skip
    panels = [p for p in panels if any(p[1](m) for r in scored for m in r.valid)]
    unit, word = clocked(scored)
    figure, axes = new(len(panels), 1, (8.6, 1.5 + 1.7 * len(panels)), sharex=True)
    looks = {name: {"ls": style, "marker": mark} for _, name, style, mark in CURVES}
    if len(scored) == 1:
        looks = {n: {**how, "color": c} for (n, how), c in zip(looks.items(), COLORS, strict=False)}
    for axis, (label, values) in zip(axes[:, 0], panels, strict=True):
        for run, color in zip(runs, _colors(runs), strict=True):
            curves: dict[str, list[tuple[float, float]]] = {}
            for line in run.valid:
                for name, value in values(line).items():
                    if math.isfinite(value):
                        curves.setdefault(name, []).append((line["seconds"] / unit, value))
            for name, points in curves.items():
                how = {"color": color, "marker": "o", "ls": "-"} | looks.get(name, {})
                axis.plot(*zip(*points, strict=True), ms=4, lw=1.3, clip_on=False, **how)
            if curves:
                _mark_joint(axis, run, unit, color)
        axis.set_ylabel(label, fontsize=9)
        axis.set_ylim(0, max(1, axis.get_ylim()[1]))
    seen = {name for run in scored for line in run.valid for name in panels[0][1](line)}
    _key(figure, scored, [(name, {**how, "ms": 4}) for name, how in looks.items() if name in seen])
    axes[-1][0].set_xlim(0, 1.03 * max(run.longest for run in scored) / unit)
    axes[-1][0].set_xlabel(f"training time, {word}")
    return save(figure, path)


def _named(line: Row, key: str, name: str, factor: float) -> dict[str, float]:
    value = line.get(f"hallucination/{key}")
    return {} if value is None else {name: factor * value}
