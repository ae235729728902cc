"""The figure of the experiment."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from measured import Result, drift, errors, hallucinated, noisy, nonspeech_rate, seeds, span
from resampling import value

from dsasr.entropy_allocation.allocation_row import AllocationRow
from dsasr.reporting import figures
from dsasr.tracking.timeline_plot import COLORS


def draw(systems: dict[str, list[Result]], path: Path) -> None:
    """Errors and hallucinations against noise, non-speech, drift, the encoder's metrics, cost."""
    every = [r for results in systems.values() for r in results]
    figure, axes = figures.new(2, 4, (15.5, 7.4))
    colors = {name: COLORS[i % len(COLORS)] for i, name in enumerate(systems)}
    against_noise(axes[0][0], systems, colors, errors, "errors", "word and character errors, %")
    hallucinations = "hallucinations on speech", "utterances, %"
    against_noise(axes[0][1], systems, colors, hallucinated, *hallucinations, share=True)
    bars(axes[0][2], systems, colors)
    dots(axes[0][3], systems, colors, drift, "drift through joint SFT", "CKA, 1: no change")
    for axis, metric in zip(axes[1], figures.METRICS, strict=False):
        before_and_after(axis, systems, colors, metric)
    cost = "audio used, augmented\n(a dot per seed)"
    dots(axes[1][3], systems, colors, lambda rs: [r["audio_hours"] for r in rs], cost, "hours")
    axes[1][3].set_ylim(0, 1.08 * max(r["audio_hours"] for r in every))
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, fontsize=9, frameon=False)
    figures.save(figure, path)


def against_noise(axis, systems, colors, measure, title, label, share: bool = False) -> None:
    """A curve per system over the SNRs of the test speech, with 95% intervals."""
    conditions = ["clean", *noisy([r for results in systems.values() for r in results])]
    highest, curves = 0.0, 0.0
    for i, (name, results) in enumerate(systems.items()):
        ratios = [measure(results, [c]) for c in conditions]
        spans = 100 * np.array([span(r, share) for r in ratios])
        middle = 100 * np.array([value(r) for r in ratios])
        highest, curves = max(highest, spans[:, 1].max()), max(curves, middle.max())
        x = np.arange(len(conditions)) + 0.11 * (i - (len(systems) - 1) / 2)
        legend = f"{results[0]['label']} ({seeds(results)})"
        axis.plot(x, middle, ".-", lw=1.2, color=colors[name], label=legend)
        # Pale, so that the curves stay in sight behind those of several systems.
        axis.vlines(x, spans[:, 0], spans[:, 1], color=colors[name], lw=2.2, alpha=0.3)
    axis.set_xticks(range(len(conditions)), ["clean", *(c[3:] for c in conditions[1:])])
    axis.set_xlabel("noise in the test speech: SNR, dB")
    axis.set_ylabel(label)
    top, cut = highest_shown(highest, curves, share)
    axis.set_ylim(-0.02 * top, top)
    note = "95%, cut at the top" if cut else "bars: 95%"
    axis.set_title(f"{title} ({note})", fontsize=10, loc="left")


def highest_shown(highest: float, curves: float, share: bool) -> tuple[float, bool]:
    """The end of an axis in percent, and whether it cuts intervals, of which the ``highest`` ends
    there and whose values reach up to ``curves``.

    A share has no more than 100%. Error rates have no limit, and with few seeds an interval may be
    many times its value: then three times the curves are shown.
    """
    limit = 100.0 if share else max(100.0, 3 * curves)
    return 1.05 * min(highest, limit) or 1.0, highest > 1.05 * limit


def before_and_after(axis, systems, colors, metric: tuple[str, str, str]) -> None:
    """A metric of each seed's encoder before and after joint SFT, beside a random encoder's."""
    key, label, title = metric
    every = [r for results in systems.values() for r in results]
    for i, (name, results) in enumerate(systems.items()):
        for x, result in zip(_seed_positions(i, len(results)), results, strict=True):
            rows = [result["before"], result["after"]]
            if all(detected(row, key) for row in rows):
                axis.plot([x, x], [r.value(key) for r in rows], "-", color=colors[name], lw=1)
            for row, fill in zip(rows, ("white", colors[name]), strict=True):
                mark = {"marker": "o", "mfc": fill, "ms": 6}
                if not detected(row, key):
                    mark = {"marker": "x", "ms": 5, "alpha": 0.7}
                axis.plot(x, row.value(key), color=colors[name], **mark)
    untrained = [r["random"].value(key) for r in every if r["random"]]
    if untrained:
        level = np.mean(untrained)
        axis.axhline(level, color="#444444", lw=1, ls=":")
        # Right of the axis, where no point lies.
        axis.annotate("random\nencoder", (1, level), (3, 0), xycoords=("axes fraction", "data"),
                      textcoords="offset points", va="center", fontsize=7)  # fmt: skip
    about = ";\n".join(notes(every, key))
    _by_system(axis, systems, f"{title}\n({about})", label)


def notes(results: Sequence[Result], key: str) -> list[str]:
    """What the marks of a metric's panel mean, and what they do not show."""
    rows = [r[side] for r in results for side in ("before", "after")]
    found = ["a pair per seed; open: before joint SFT"]
    if not all(detected(row, key) for row in rows):
        found.append("×: not above 0 and its controls")
    if key == "csai" and any(math.isnan(row.csai.phoneme_only) for row in rows):
        # Features of phonemes alone give CSAI above zero in most cases (csai_nulls.md).
        found.append("not against phonemes alone: no sign of words")
    return found


def detected(row: AllocationRow, key: str) -> bool:
    """Whether a metric is above zero and its controls; NSE, a property of the frames, has none."""
    return key == "nse" or getattr(row, key).detected


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
