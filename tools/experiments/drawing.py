"""The figure of the experiment."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from measured import Result, drift, errors, hallucinated, noisy, nonspeech_rate, seeds, span
from resampling import value

from dsasr.reporting import figures
from dsasr.tracking.timeline_plot import COLORS


def draw(systems: dict[str, list[Result]], path: Path) -> None:
    """Errors and hallucinations against noise, non-speech, drift, the encoder's metrics, cost."""
    every = [r for results in systems.values() for r in results]
    figure, axes = figures.new(2, 4, (15.5, 7.0))
    conditions = ["clean", *noisy(every)]
    ticks = ["clean", *(f"{c[3:]}" for c in conditions[1:])]
    colors = {name: COLORS[i % len(COLORS)] for i, name in enumerate(systems)}
    for axis, measure, title, label, share in (
        (axes[0][0], errors, "errors", "word and character errors, %", False),
        (axes[0][1], hallucinated, "hallucinations on speech", "utterances, %", True),
    ):
        highest = 0.01
        for i, (name, results) in enumerate(systems.items()):
            ratios = [measure(results, [c]) for c in conditions]
            spans = np.array([span(r, share) for r in ratios])
            highest = max(highest, spans[:, 1].max())
            x = np.arange(len(conditions)) + 0.09 * (i - (len(systems) - 1) / 2)
            middle = 100 * np.array([value(r) for r in ratios])
            legend = f"{results[0]['label']} ({seeds(results)})"
            axis.plot(x, middle, ".-", lw=1.2, color=colors[name], label=legend)
            axis.vlines(x, 100 * spans[:, 0], 100 * spans[:, 1], color=colors[name], lw=1)
        axis.set_xticks(range(len(conditions)), ticks)
        axis.set_xlabel("noise in the test speech: SNR, dB")
        axis.set_ylabel(label)
        # With few seeds an interval may be many times its value: scale to the curves.
        top = 2 * max(line.get_ydata().max() for line in axis.lines)
        axis.set_ylim(0, top or 110 * highest)
        axis.set_title(f"{title} (95%, cut at the top)", fontsize=10, loc="left")
    bars(axes[0][2], systems, colors)
    dots(axes[0][3], systems, colors, drift, "drift through joint SFT", "CKA, 0 to 1")
    for axis, (key, label, title) in zip(axes[1], figures.METRICS, strict=False):
        for i, (name, results) in enumerate(systems.items()):
            pairs = [(r["before"].value(key), r["after"].value(key)) for r in results]
            for x, pair in zip(_seed_positions(i, len(pairs)), pairs, strict=True):
                axis.plot([x, x], pair, "-", color=colors[name], lw=1)
                axis.plot(x, pair[0], "o", mfc="white", mec=colors[name], ms=6)
                axis.plot(x, pair[1], "o", color=colors[name], ms=6)
        untrained = [r["random"].value(key) for r in every if r["random"]]
        if untrained:
            level = np.mean(untrained)
            axis.axhline(level, color="#444444", lw=1, ls=":")
            coords = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
            axis.annotate("random encoder", (1, level), (0, 3), ha="right", fontsize=8, **coords)
        _by_system(axis, systems, f"{title}\n(open: before joint SFT; a pair per seed)", label)
    cost = "audio used, augmented\n(a dot per seed)"
    dots(axes[1][3], systems, colors, lambda rs: [r["audio_hours"] for r in rs], cost, "hours")
    axes[1][3].set_ylim(0, 1.08 * max(r["audio_hours"] for r in every))
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, fontsize=9, frameon=False)
    figures.save(figure, path)


def bars(axis, systems: dict[str, list[Result]], colors: dict[str, str]) -> None:
    for i, (name, results) in enumerate(systems.items()):
        ratio = nonspeech_rate(results)
        axis.bar(i, value(ratio), 0.6, color=colors[name])
        axis.vlines(i, *span(ratio), color=figures.INK, lw=1)
    _by_system(axis, systems, "text on non-speech", "characters a minute")


def dots(axis, systems, colors, values: Callable[[Sequence[Result]], list[float]], title, label):
    """A dot per seed."""
    for i, (name, results) in enumerate(systems.items()):
        y = values(results)
        axis.plot(_seed_positions(i, len(y)), y, "o", color=colors[name], ms=6)
    _by_system(axis, systems, title, label)


def _seed_positions(i: int, count: int) -> np.ndarray:
    return i + 0.14 * (np.arange(count) - (count - 1) / 2)


def _by_system(axis, systems, title: str, label: str) -> None:
    axis.set_xticks(range(len(systems)), [h[0]["label"].split()[0] for h in systems.values()])
    axis.set_xlim(-0.6, len(systems) - 0.4)
    axis.set_title(title, fontsize=10, loc="left")
    axis.set_ylabel(label)
    axis.set_xlabel("system")
