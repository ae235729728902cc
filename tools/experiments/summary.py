"""The experiment's tables and figure from its results.

python tools/experiments/summary.py       # writes results/SET.md, results/SET.png, results/short.md

Means over the seeds there are: each row says how many. Intervals are 95% ones over seeds and test
clips, tests are paired (`resampling`); with one seed they do not cover other seeds.
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
    drift,
    errors,
    hallucinated,
    langs,
    load,
    noisy,
    nonspeech_rate,
    seeds,
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
    measured = [v for v in values if v is not None]
    if not measured:
        return "–"
    text = f"{np.mean(measured):.{digits}f}"
    ends = f" ({min(measured):.{digits}f}–{max(measured):.{digits}f})"
    return text + (ends if len(measured) > 1 else "")


def changed(results: Sequence[Result], metric: str) -> str:
    """Means before and after joint SFT, and the mean change with its interval over seeds; where
    nothing is detected in any seed, the highest known detection limit."""
    before, after = ([r[side].value(metric) for r in results] for side in ("before", "after"))
    rows = [r[side] for r in results for side in ("before", "after")]
    estimates = [] if metric == "nse" else [getattr(row, metric) for row in rows]
    if estimates and not any(e.detected for e in estimates):
        limits = [e.detection_limit for e in estimates if math.isfinite(e.detection_limit)]
        return "none found" + (f" (< {max(limits):.3f})" if limits else "")
    digits = 3 if metric == "csai" else 2
    text = f"{np.mean(before):.{digits}f} → {np.mean(after):.{digits}f}"
    gap, half, _ = over_seeds(np.subtract(after, before))
    return text if math.isnan(half) else f"{text} ({gap:+.{digits}f} ± {half:.{digits}f})"


def tables(systems: dict[str, list[Result]]) -> str:
    """Markdown: errors and hallucinations, encoder metrics, paired tests."""
    every = [r for results in systems.values() for r in results]
    snrs, tags = noisy(every), langs(every)
    parts = []
    head = ["system", "seeds", *(f"{tag}, clean" for tag in tags)]
    head += ["all, clean"] * (len(tags) > 1) + [f"{c[3:]} dB" for c in snrs]
    rows = []
    for results in systems.values():
        row = [results[0]["label"], str(len(results))]
        row += [cell(errors(results, ["clean"], tag)) for tag in tags]
        rest = (["clean"] if len(tags) > 1 else []) + snrs
        rows.append(row + [cell(errors(results, [c])) for c in rest])
    parts += [
        "Errors, % (English in words, Mandarin in characters; at an SNR all together; 95% interval "
        f"over {_resampled(systems)}):",
        markdown(head, rows),
    ]
    cuts = sorted({c for r in every for c in r["clips"] if c.startswith("cut")})
    rows = [
        [results[0]["label"], str(len(results)),
         *(cell(hallucinated(results, [c]), share=True) for c in ["clean", *snrs, *cuts]),
         cell(nonspeech_rate(results), 1, 0)]
        for results in systems.values()
    ]  # fmt: skip
    head = ["system", "seeds", "clean", *(f"{c[3:]} dB" for c in snrs)]
    head += [*(f"cut at {c[3:]}%" for c in cuts), "non-speech, characters/min"]
    parts += ["Hallucinated utterances, %, and text on non-speech (95%):", markdown(head, rows)]
    rows = []
    for results in systems.values():
        row = [results[0]["label"], str(len(results)), ranged([r["ctc"] for r in results])]
        row += [changed(results, m) for m in ("nse", "pai", "csai")]
        row += [ranged(drift(results), 3)]
        row += [ranged([r["after"].llm and r["after"].llm.resolved for r in results])]
        row += [ranged([r["audio_hours"] for r in results], 1)]
        rows.append([*row, ranged([r["train_seconds"] / 60 for r in results], 1)])
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
    """The estimates of the controls, shuffled frames and a random encoder: means and ranges over
    the pretrainings that have them."""
    controlled = [r for r in results if r["random"]]
    if not controlled:
        return ""
    texts = []
    for key in ("pai", "csai"):
        digits = 2 if key == "pai" else 3
        shuffled = sorted({getattr(r["before"], key).shuffled for r in controlled})
        random = sorted({r["random"].value(key) for r in controlled})
        shuffled, random = ranged(shuffled, digits), ranged(random, digits)
        text = f"{key.upper()} {shuffled} with shuffled labels, {random} of a random encoder"
        alone = [getattr(r["before"], key).phoneme_only for r in results]
        if alone := sorted({x for x in alone if math.isfinite(x)}):
            text += f", {ranged(alone, digits)} of phonemes alone"
        elif key == "csai":
            text += (
                "; these CSAI have no control of phonemes alone, and do not show that an encoder "
                "tells of words (encoders-SET.md has it, where it was measured anew)"
            )
        texts.append(text)
    return f"Controls, nats/frame: {'; '.join(texts)}."


def short(systems: dict[str, list[Result]]) -> str:
    """The few columns that matter most, for a README."""
    every = [r for results in systems.values() for r in results]
    snrs = noisy(every)
    mid = min(snrs, key=lambda c: abs(float(c[3:]) - 5)) if snrs else "clean"
    worst = snrs[-1] if snrs else "clean"
    numbers = {len(results) for results in systems.values()}
    head = ["system", "errors clean, %", f"errors {_condition_name(mid)}, %"]
    head += [
        f"hallucinated {_condition_name(worst)}, %",
        "non-speech, characters/min",
        "CKA through joint",
    ]
    rows = []
    for results in systems.values():
        label = results[0]["label"] + (f" ({seeds(results)})" if len(numbers) > 1 else "")
        row = [label, cell(errors(results, ["clean"])), cell(errors(results, [mid]))]
        row += [
            cell(hallucinated(results, [worst]), share=True),
            cell(nonspeech_rate(results), 1, 0),
        ]
        rows.append([*row, ranged(drift(results), 3)])
    alike = f"mean of {seeds(next(iter(systems.values())))}" if len(numbers) == 1 else "means"
    caption = f"{alike}, 95% interval over {_resampled(systems)}; CKA: range over seeds."
    return f"{markdown(head, rows)}\n\n{caption[0].upper()}{caption[1:]}\n"


def _resampled(systems: dict[str, list[Result]]) -> str:
    """What the intervals are over."""
    numbers = {len(results) for results in systems.values()}
    if numbers == {1}:
        return "clips alone"
    return "seeds and clips" + (", with one seed over clips alone" if 1 in numbers else "")


def _condition_name(condition: str) -> str:
    return f"at {condition[3:]} dB" if condition.startswith("snr") else condition


# The whole difference of the conventional system and the paper's, then one change at a time.
PAIRS = (("conventional", "paper"), ("phoneme", "paper"),
         ("conventional", "phoneme"), ("phoneme", "late-joint"), ("late-joint", "paper-ctc"),
         ("paper-ctc", "paper"), ("no-swap", "paper"), ("no-joint", "paper"))  # fmt: skip


def comparisons(systems: dict[str, list[Result]], snrs: Sequence[str]):
    """Head and rows of the paired tests; only seeds that both have."""
    measures: dict[str, tuple[Callable[[Sequence[Result]], Ratio], float]] = {
        "clean errors, points": (lambda r: errors(r, ["clean"]), 100),
        "noisy errors, points": (lambda r: errors(r, snrs), 100),
        "hallucinated in noise, points": (lambda r: hallucinated(r, snrs), 100),
        "non-speech, characters/min": (nonspeech_rate, 1),
    }
    if not snrs:
        measures = {k: v for k, v in measures.items() if "nois" not in k}
    rows = []
    for first, second in PAIRS:
        shared = {r["seed"] for r in systems.get(first, ())}
        shared &= {r["seed"] for r in systems.get(second, ())}
        if not shared:
            continue
        a, b = ([r for r in systems[n] if r["seed"] in shared] for n in (first, second))
        row = [f"{first}, {second}", str(len(shared))]
        for measure, factor in measures.values():
            gap, low, high, p = paired(measure(a), measure(b))
            width = f"{factor * low:+.1f} to {factor * high:+.1f}"
            row.append(f"{factor * gap:+.1f} ({width}), {_chance(p)}")
        drift_a, drift_b = drift(a), drift(b)
        if drift_a and len(drift_a) == len(drift_b):
            gap, half, p = over_seeds(np.subtract(drift_b, drift_a))
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
