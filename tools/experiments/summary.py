"""The experiment's table and figure from its results.

python tools/experiments/summary.py            # writes results/SET.md and results/SET.png

Means over seeds. Intervals and p-values come from a bootstrap of two levels: seeds, then test
utterances, drawn alike for the systems that are compared; with few seeds they are rough, and with
one seed they say nothing of other seeds.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from systems import SYSTEMS

from dsasr import figures
from dsasr.errors import UserError, run_tool
from dsasr.files import atomic_write
from dsasr.pictures import COLOURS

RESULTS = Path(__file__).parent / "results"
DRAWS = 2000
Result = dict[str, Any]
Ratio = tuple[np.ndarray, np.ndarray]  # over, under: a row per seed, a column per clip


def load(folder: Path) -> dict[str, list[Result]]:
    """System → its results by seed, in the order of the table."""
    found = [json.loads(p.read_text(encoding="utf-8")) for p in sorted(folder.glob("*-seed*.json"))]
    if not found:
        raise UserError(f"{folder} holds no results yet: run tools/reproduce.sh")
    return {
        s.name: sorted(held, key=lambda r: r["seed"])
        for s in sorted(SYSTEMS, key=lambda s: s.label)
        if (held := [r for r in found if r["system"] == s.name])
    }


# -- ratios and their bootstrap ----------------------------------------------------------------


def errors(results: Sequence[Result], conditions: Sequence[str], lang: str | None = None) -> Ratio:
    """Errors over reference units."""
    return (
        _utterances(results, conditions, "errors", lang),
        _utterances(results, conditions, "units", lang),
    )


def hallucinated(results: Sequence[Result], conditions: Sequence[str]) -> Ratio:
    """Hallucinated utterances over utterances."""
    over = _utterances(results, conditions, "flagged", None)
    return over, np.full_like(over, len(conditions))


def invented(results: Sequence[Result]) -> Ratio:
    """Characters over minutes of non-speech."""
    kinds = sorted({c for r in results for c, held in r["clips"].items() if "characters" in held})

    def clips(key: str) -> np.ndarray:
        return np.array([[x for c in kinds for x in r["clips"][c][key]] for r in results], float)

    return clips("characters"), clips("seconds") / 60


def _utterances(results, conditions, key: str, lang: str | None) -> np.ndarray:
    """Sums over conditions, a column per utterance: an utterance at several SNRs is one draw, since
    its conditions are alike."""
    rows = []
    for result in results:
        held = [result["clips"][c] for c in conditions]
        keep = [lang in (None, la) for la in held[0]["lang"]]
        rows.append(np.sum([c[key] for c in held], axis=0)[keep])
    return np.array(rows, float)


def value(ratio: Ratio) -> float:
    """The mean over seeds of Σ over / Σ under."""
    under = ratio[1].sum(1)
    return float((ratio[0].sum(1) / under).mean()) if under.all() else math.nan


def draws(ratio: Ratio, seed: int = 0) -> np.ndarray:
    """`value` of resampled seeds and clips; the same picks for ratios of the same shape."""
    rng = np.random.default_rng(seed)
    over, under = ratio
    seeds, clips = over.shape
    out = np.empty(DRAWS)
    for i in range(DRAWS):
        rows = rng.integers(0, seeds, seeds)[:, None]
        columns = rng.integers(0, clips, clips)
        out[i] = (over[rows, columns].sum(1) / np.maximum(under[rows, columns].sum(1), 1e-9)).mean()
    return out


def interval(ratio: Ratio) -> tuple[float, float]:
    low, high = np.quantile(draws(ratio), [0.025, 0.975])
    return float(low), float(high)


def paired(a: Ratio, b: Ratio) -> tuple[float, float, float, float]:
    """(difference b − a, low, high, two-sided p); the same seeds and clips on both sides."""
    delta = draws(b) - draws(a)
    low, high = np.quantile(delta, [0.025, 0.975])
    tail = min((delta <= 0).sum(), (delta >= 0).sum())
    p = min(1.0, 2 * (int(tail) + 1) / (DRAWS + 1))
    return value(b) - value(a), float(low), float(high), p


# -- table -------------------------------------------------------------------------------------


def noisy(results: Sequence[Result]) -> list[str]:
    """Conditions by falling SNR."""
    found = {c for r in results for c in r["clips"] if c.startswith("snr")}
    return sorted(found, key=lambda c: -float(c[3:]))


def langs(results: Sequence[Result]) -> list[str]:
    return sorted(set(results[0]["clips"]["clean"]["lang"]))


def cell(ratio: Ratio, factor: float = 100, digits: int = 1) -> str:
    low, high = (factor * x for x in interval(ratio))
    return f"{factor * value(ratio):.{digits}f} ({low:.{digits}f}–{high:.{digits}f})"


def spread(values: Sequence[float | None], digits: int = 2) -> str:
    """Mean and range over seeds."""
    held = [v for v in values if v is not None]
    if not held:
        return "–"
    text = f"{np.mean(held):.{digits}f}"
    return f"{text} ({min(held):.{digits}f}–{max(held):.{digits}f})" if len(held) > 1 else text


def tables(systems: dict[str, list[Result]]) -> str:
    """Markdown: errors and hallucinations, encoder metrics, paired tests."""
    every = [r for held in systems.values() for r in held]
    snrs, tags = noisy(every), langs(every)
    parts = []
    head = ["system", "seeds", *(f"{tag}, clean" for tag in tags)]
    head += [f"{c[3:]} dB" for c in snrs]
    rows = []
    for held in systems.values():
        row = [held[0]["label"], str(len(held))]
        row += [cell(errors(held, ["clean"], tag)) for tag in tags]
        rows.append(row + [cell(errors(held, [c])) for c in snrs])
    parts += ["Errors, % (WER for words, CER for characters; 95%):", markdown(head, rows)]
    rows = [
        [held[0]["label"], cell(hallucinated(held, ["clean"])),
         *(cell(hallucinated(held, [c])) for c in snrs), cell(invented(held), 1, 0)]
        for held in systems.values()
    ]  # fmt: skip
    head = ["system", "clean", *(f"{c[3:]} dB" for c in snrs), "non-speech, characters/min"]
    parts += ["Hallucinated utterances, %, and text on non-speech (95%):", markdown(head, rows)]
    rows = []
    for held in systems.values():
        row = [held[0]["label"]]
        row += [
            f"{spread([_metric(r['before'], m) for r in held])} → "
            f"{spread([_metric(r['after'], m) for r in held])}"
            for m in ("nse", "pai", "csai")
        ]
        row += [spread([r["cka_through_joint"] for r in held], 3)]
        row += [spread([r["after"].get("llm", {}).get("resolved") for r in held])]
        row += [spread([r["audio_hours"] for r in held], 1)]
        rows.append([*row, spread([r["train_seconds"] / 60 for r in held], 1)])
    head = ["system", "NSE", "PAI, nats/frame", "CSAI, nats/frame", "CKA through joint"]
    head += ["H₀ − H₁, nats/token", "audio-hours", "minutes"]
    parts += ["Encoder before → after joint SFT (mean, range over seeds):", markdown(head, rows)]
    parts += ["Paired, second less first (95%, p):", markdown(*comparisons(systems, snrs))]
    return "\n\n".join(parts) + "\n"


def _metric(row: Result, name: str) -> float:
    held = row[name]
    return held["value"] if isinstance(held, dict) else held


PAIRS = (("conventional", "paper"), ("phoneme", "paper"), ("conventional", "phoneme"),
         ("no-swap", "paper"), ("no-joint", "paper"), ("paper-ctc", "paper"),
         ("phoneme", "paper-ctc"))  # fmt: skip


def comparisons(systems: dict[str, list[Result]], snrs: Sequence[str]):
    """Head and rows of the paired tests; only seeds that both have."""
    measures: dict[str, tuple[Callable[[Sequence[Result]], Ratio], float]] = {
        "clean errors, points": (lambda r: errors(r, ["clean"]), 100),
        "noisy errors, points": (lambda r: errors(r, snrs), 100),
        "hallucinated in noise, points": (lambda r: hallucinated(r, snrs), 100),
        "non-speech, characters/min": (invented, 1),
    }
    rows = []
    for first, second in PAIRS:
        if first not in systems or second not in systems:
            continue
        seeds = {r["seed"] for r in systems[first]} & {r["seed"] for r in systems[second]}
        a, b = ([r for r in systems[n] if r["seed"] in seeds] for n in (first, second))
        if not seeds:
            continue
        row = [f"{first}, {second}"]
        for measure, factor in measures.values():
            gap, low, high, p = paired(measure(a), measure(b))
            span = f"{factor * low:+.1f} to {factor * high:+.1f}"
            row.append(f"{factor * gap:+.1f} ({span}), p {p:.3f}")
        rows.append(row)
    return ["systems", *measures], rows


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


# -- figure ------------------------------------------------------------------------------------


def draw(systems: dict[str, list[Result]], path: Path) -> None:
    """Errors and hallucinations against noise, non-speech, and the encoder's metrics."""
    every = [r for held in systems.values() for r in held]
    figure, axes = figures.new(2, 3, (12.6, 6.8))
    conditions = ["clean", *noisy(every)]
    ticks = ["clean", *(f"{c[3:]} dB" for c in conditions[1:])]
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(systems)}
    for axis, measure, label in (
        (axes[0][0], errors, "errors, %"),
        (axes[0][1], hallucinated, "hallucinated utterances, %"),
    ):
        for i, (name, held) in enumerate(systems.items()):
            ratios = [measure(held, [c]) for c in conditions]
            spans = np.array([interval(r) for r in ratios])
            at = np.arange(len(conditions)) + 0.09 * (i - (len(systems) - 1) / 2)
            middle = 100 * np.array([value(r) for r in ratios])
            axis.plot(at, middle, ".-", lw=1.2, color=colours[name], label=held[0]["label"])
            axis.vlines(at, 100 * spans[:, 0], 100 * spans[:, 1], color=colours[name], lw=1)
        axis.set_xticks(range(len(conditions)), ticks)
        axis.set_xlabel("noise: SNR of the test speech")
        axis.set_ylabel(label)
        axis.set_ylim(bottom=0)
    bars(axes[0][2], systems, colours)
    for axis, (key, label, title) in zip(axes[1], figures.METRICS, strict=True):
        for i, (name, held) in enumerate(systems.items()):
            pairs = [(_metric(r["before"], key), _metric(r["after"], key)) for r in held]
            for j, pair in enumerate(pairs):
                at = i + 0.12 * (j - (len(pairs) - 1) / 2)
                axis.plot([at, at], pair, "-", color=colours[name], lw=1)
                axis.plot(at, pair[0], "o", mfc="white", mec=colours[name], ms=6)
                axis.plot(at, pair[1], "o", color=colours[name], ms=6)
        axis.set_xticks(range(len(systems)), [_tag(h) for h in systems.values()])
        axis.set_xlim(-0.6, len(systems) - 0.4)
        axis.set_title(f"{title} (open: before joint)", fontsize=9, loc="left")
        axis.set_ylabel(label)
        axis.set_xlabel("system")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, fontsize=9, frameon=False)
    figures.save(figure, path)


def bars(axis, systems: dict[str, list[Result]], colours: dict[str, str]) -> None:
    for i, (name, held) in enumerate(systems.items()):
        ratio = invented(held)
        low, high = interval(ratio)
        axis.bar(i, value(ratio), 0.6, color=colours[name])
        axis.vlines(i, low, high, color=figures.INK, lw=1)
    axis.set_xticks(range(len(systems)), [_tag(h) for h in systems.values()])
    axis.set_xlabel("system")
    axis.set_ylabel("non-speech: characters a minute")


def _tag(held: Sequence[Result]) -> str:
    return held[0]["label"].split()[0]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    sets = sorted(p for p in args.results.glob("*") if p.is_dir()) if args.results.is_dir() else []
    if not sets:
        raise UserError(f"{args.results} holds no results yet: run tools/reproduce.sh")
    for folder in sets:
        systems = load(folder)
        text = tables(systems)
        atomic_write(args.results / f"{folder.name}.md", text)
        draw(systems, args.results / f"{folder.name}.png")
        print(f"== {folder.name}\n\n{text}")
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(main))
