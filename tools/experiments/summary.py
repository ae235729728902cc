"""The experiment's tables and figure from its results.

python tools/experiments/summary.py       # writes results/SET.md, results/SET.png, results/short.md

Means over the seeds that there are: each row says how many. Intervals are 95% ones over seeds and
test clips, tests are paired (`resampling`); with one seed they say nothing of other seeds.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
import drawing
from measured import (
    Result,
    counted,
    drift,
    errors,
    hallucinated,
    invented,
    langs,
    load,
    noisy,
    reading,
    span,
)
from resampling import Ratio, over_seeds, paired, value

from dsasr.utils.errors import UserError, run_tool
from dsasr.utils.io import atomic_write

RESULTS = Path(__file__).parent / "results"


def cell(ratio: Ratio, factor: float = 100, digits: int = 1, share: bool = False) -> str:
    low, high = (factor * x for x in span(ratio, share))
    return f"{factor * value(ratio):.{digits}f} ({low:.{digits}f}–{high:.{digits}f})"


def ranged(values: Sequence[float | None], digits: int = 2) -> str:
    """Mean and range over seeds."""
    held = [v for v in values if v is not None]
    if not held:
        return "–"
    text = f"{np.mean(held):.{digits}f}"
    return f"{text} ({min(held):.{digits}f}–{max(held):.{digits}f})" if len(held) > 1 else text


def changed(held: Sequence[Result], metric: str) -> str:
    """Means before and after joint SFT, and the mean change with its interval over seeds; of what
    no probe found in any seed, the highest limit of detection that was looked for."""
    before, after = ([reading(r[side], metric) for r in held] for side in ("before", "after"))
    rows = [r[side][metric] for r in held for side in ("before", "after")]
    if all(isinstance(row, dict) and not row.get("found", True) for row in rows):
        limits = [row["limit"] for row in rows if row["limit"] is not None]
        return "none found" + (f" (< {max(limits):.3f})" if limits else "")
    digits = 3 if metric == "csai" else 2
    text = f"{np.mean(before):.{digits}f} → {np.mean(after):.{digits}f}"
    gap, half, _ = over_seeds(np.subtract(after, before))
    return text if math.isnan(half) else f"{text} ({gap:+.{digits}f} ± {half:.{digits}f})"


def tables(systems: dict[str, list[Result]]) -> str:
    """Markdown: errors and hallucinations, encoder metrics, paired tests."""
    every = [r for held in systems.values() for r in held]
    snrs, tags = noisy(every), langs(every)
    parts = []
    head = ["system", "seeds", *(f"{tag}, clean" for tag in tags)]
    head += ["all, clean"] * (len(tags) > 1) + [f"{c[3:]} dB" for c in snrs]
    rows = []
    for held in systems.values():
        row = [held[0]["label"], str(len(held))]
        row += [cell(errors(held, ["clean"], tag)) for tag in tags]
        rest = (["clean"] if len(tags) > 1 else []) + snrs
        rows.append(row + [cell(errors(held, [c])) for c in rest])
    parts += [
        "Errors, % (English in words, Mandarin in characters; at an SNR all together; 95% interval "
        f"over {_drawn(systems)}):",
        markdown(head, rows),
    ]
    cuts = sorted({c for r in every for c in r["clips"] if c.startswith("cut")})
    rows = [
        [held[0]["label"], str(len(held)),
         *(cell(hallucinated(held, [c]), share=True) for c in ["clean", *snrs, *cuts]),
         cell(invented(held), 1, 0)]
        for held in systems.values()
    ]  # fmt: skip
    head = ["system", "seeds", "clean", *(f"{c[3:]} dB" for c in snrs)]
    head += [*(f"cut at {c[3:]}%" for c in cuts), "non-speech, characters/min"]
    parts += ["Hallucinated utterances, %, and text on non-speech (95%):", markdown(head, rows)]
    rows = []
    for held in systems.values():
        row = [held[0]["label"], str(len(held)), ranged([r["ctc"] for r in held])]
        row += [changed(held, m) for m in ("nse", "pai", "csai")]
        row += [ranged(drift(held), 3)]
        row += [ranged([r["after"].get("llm", {}).get("resolved") for r in held])]
        row += [ranged([r["audio_hours"] for r in held], 1)]
        rows.append([*row, ranged([r["train_seconds"] / 60 for r in held], 1)])
    head = ["system", "seeds", "CTC, nats/label", "NSE", "PAI, nats/frame", "CSAI, nats/frame"]
    head += ["CKA through joint", "H₀ − H₁, nats/token", "audio-hours", "minutes"]
    parts += [
        "The sft branch's encoder before → after joint SFT (mean change ± half its 95% interval "
        "over seeds); else mean and range over seeds. CTC: the training loss at pretraining's end; "
        "minutes: of all steps, without start, evaluation and checkpoints, beside another job:",
        markdown(head, rows),
    ]
    if controls := baselines(every):
        parts.append(controls)
    head, rows = comparisons(systems, snrs)
    if rows:
        count = sum(cell != "–" for row in rows for cell in row[2:])
        parts += [
            "Paired by seed and clip, the second less the first (95% interval; p not corrected "
            f"for the {count} tests made; a row of one seed speaks of these trained models only):",
            markdown(head, rows),
        ]
    return "\n\n".join(parts) + "\n"


def baselines(results: Sequence[Result]) -> str:
    """What the probes find where there is nothing to be found: labels shuffled, a random encoder;
    means and ranges over the pretrainings that were measured so."""
    held = [r for r in results if r.get("random")]
    if not held:
        return ""
    said = []
    for key in ("pai", "csai"):
        digits = 2 if key == "pai" else 3
        shuffled = ranged(sorted({r["before"][key]["shuffled"] for r in held}), digits)
        random = ranged(sorted({r["random"][key]["value"] for r in held}), digits)
        said.append(f"{key.upper()} {shuffled} with shuffled labels, {random} of a random encoder")
    return f"Controls, nats/frame: {'; '.join(said)}."


def short(systems: dict[str, list[Result]]) -> str:
    """The few columns that tell most, for a README."""
    every = [r for held in systems.values() for r in held]
    snrs = noisy(every)
    mid = min(snrs, key=lambda c: abs(float(c[3:]) - 5)) if snrs else "clean"
    worst = snrs[-1] if snrs else "clean"
    numbers = {len(held) for held in systems.values()}
    head = ["system", "errors clean, %", f"errors {_said(mid)}, %"]
    head += [f"hallucinated {_said(worst)}, %", "non-speech, characters/min", "CKA through joint"]
    rows = []
    for held in systems.values():
        label = held[0]["label"] + (f" ({counted(held)})" if len(numbers) > 1 else "")
        row = [label, cell(errors(held, ["clean"])), cell(errors(held, [mid]))]
        row += [cell(hallucinated(held, [worst]), share=True), cell(invented(held), 1, 0)]
        rows.append([*row, ranged(drift(held), 3)])
    alike = f"mean of {counted(next(iter(systems.values())))}" if len(numbers) == 1 else "means"
    caption = f"{alike}, 95% interval over {_drawn(systems)}; CKA: range over seeds."
    return f"{markdown(head, rows)}\n\n{caption[0].upper()}{caption[1:]}\n"


def _drawn(systems: dict[str, list[Result]]) -> str:
    """What the intervals are over: one seed says nothing of others."""
    numbers = {len(held) for held in systems.values()}
    if numbers == {1}:
        return "clips alone"
    return "seeds and clips" + (", with one seed over clips alone" if 1 in numbers else "")


def _said(condition: str) -> str:
    return f"at {condition[3:]} dB" if condition.startswith("snr") else condition


# The whole step from the conventional system to the paper's, then one change at a time.
PAIRS = (("conventional", "paper"), ("phoneme", "paper"),
         ("conventional", "phoneme"), ("phoneme", "late-joint"), ("late-joint", "paper-ctc"),
         ("paper-ctc", "paper"), ("no-swap", "paper"), ("no-joint", "paper"))  # fmt: skip


def comparisons(systems: dict[str, list[Result]], snrs: Sequence[str]):
    """Head and rows of the paired tests; only seeds that both have."""
    measures: dict[str, tuple[Callable[[Sequence[Result]], Ratio], float]] = {
        "clean errors, points": (lambda r: errors(r, ["clean"]), 100),
        "noisy errors, points": (lambda r: errors(r, snrs), 100),
        "hallucinated in noise, points": (lambda r: hallucinated(r, snrs), 100),
        "non-speech, characters/min": (invented, 1),
    }
    if not snrs:
        measures = {k: v for k, v in measures.items() if "nois" not in k}
    rows = []
    for first, second in PAIRS:
        seeds = {r["seed"] for r in systems.get(first, ())}
        seeds &= {r["seed"] for r in systems.get(second, ())}
        if not seeds:
            continue
        a, b = ([r for r in systems[n] if r["seed"] in seeds] for n in (first, second))
        row = [f"{first}, {second}", str(len(seeds))]
        for measure, factor in measures.values():
            gap, low, high, p = paired(measure(a), measure(b))
            width = f"{factor * low:+.1f} to {factor * high:+.1f}"
            row.append(f"{factor * gap:+.1f} ({width}), {_chance(p)}")
        one, two = drift(a), drift(b)
        if one and len(one) == len(two):
            gap, half, p = over_seeds(np.subtract(two, one))
            tail = "" if math.isnan(p) else f" (± {half:.3f}), {_chance(p)}"
            row.append(f"{gap:+.3f}{tail}")
        else:
            row.append("–")
        rows.append(row)
    return ["systems", "seeds", *measures, "CKA through joint"], rows


def _chance(p: float) -> str:
    return f"p {p:.3f}" if p >= 0.001 else "p < 0.001"


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    sets = sorted(p for p in args.results.glob("*") if p.is_dir()) if args.results.is_dir() else []
    if not sets:
        raise UserError(f"{args.results} holds no results yet: run tools/reproduce.sh")
    brief = []
    for folder in sets:
        systems = load(folder)
        text = tables(systems)
        atomic_write(args.results / f"{folder.name}.md", text)
        drawing.draw(systems, args.results / f"{folder.name}.png")
        brief.append(f"{folder.name}:\n\n{short(systems)}")
        print(f"== {folder.name}\n\n{text}")
    atomic_write(args.results / "short.md", "\n".join(brief))
    print("\n".join(brief))
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(main))
