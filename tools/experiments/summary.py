"""The experiment's tables and figure from its results.

python tools/experiments/summary.py       # writes results/SET.md, results/SET.png, results/short.md

Means over the seeds that there are: each row says how many. Intervals are 95% ones over seeds and
test clips, tests are paired (`resampling`); with one seed they say nothing of other seeds.
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
from resampling import Ratio, interval, over_seeds, paired, value
from systems import SYSTEMS

from dsasr import figures
from dsasr.errors import UserError, run_tool
from dsasr.evaluation.hallucination import wilson
from dsasr.files import atomic_write
from dsasr.pictures import COLOURS

RESULTS = Path(__file__).parent / "results"
Result = dict[str, Any]
JOINT = {s.name for s in SYSTEMS if s.joint != "none"}


def load(folder: Path) -> dict[str, list[Result]]:
    """System → its results by seed, in the order of the table. Raises `UserError` without results,
    or where they are not of the same test clips and sizes."""
    found = [json.loads(p.read_text(encoding="utf-8")) for p in sorted(folder.glob("*-seed*.json"))]
    if not found:
        raise UserError(f"{folder} holds no results yet: run tools/reproduce.sh")
    heard = {tuple((c, len(r["clips"][c]["lang"])) for c in sorted(r["clips"])) for r in found}
    if len(heard) > 1:
        raise UserError(
            f"{folder} mixes test sets: delete the results with other --limit or --clips"
        )
    if len({json.dumps(r["sizes"], sort_keys=True) for r in found}) > 1:
        raise UserError(f"{folder} mixes sizes: delete the results that were trained with others")
    return {
        s.name: sorted(held, key=lambda r: r["seed"])
        for s in sorted(SYSTEMS, key=lambda s: s.label)
        if (held := [r for r in found if r["system"] == s.name])
    }


# -- ratios --------------------------------------------------------------------------------------


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


# -- table -------------------------------------------------------------------------------------


def noisy(results: Sequence[Result]) -> list[str]:
    """Conditions by falling SNR."""
    found = {c for r in results for c in r["clips"] if c.startswith("snr")}
    return sorted(found, key=lambda c: -float(c[3:]))


def langs(results: Sequence[Result]) -> list[str]:
    return sorted(set(results[0]["clips"]["clean"]["lang"]))


def span(ratio: Ratio, share: bool = False) -> tuple[float, float]:
    """The interval of a ratio; of a share of utterances of which none is counted, Wilson's."""
    low, high = interval(ratio, 1.0 if share else math.inf)
    if share and not ratio[0].any():
        high = wilson(0, ratio[0].shape[1])[1]
    return low, high


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
    no probe found in any seed, the highest limit of detection if there is one for all."""
    before, after = ([_metric(r[side], metric) for r in held] for side in ("before", "after"))
    rows = [r[side][metric] for r in held for side in ("before", "after")]
    if all(isinstance(row, dict) and not row.get("found", True) for row in rows):
        limits = [row["limit"] for row in rows if row["limit"] is not None]
        return "none found" + (f" (< {max(limits):.3f})" if len(limits) == len(rows) else "")
    digits = 3 if metric == "csai" else 2
    text = f"{np.mean(before):.{digits}f} → {np.mean(after):.{digits}f}"
    gap, half, _ = over_seeds(np.subtract(after, before))
    return text if math.isnan(half) else f"{text} ({gap:+.{digits}f} ± {half:.{digits}f})"


def drift(held: Sequence[Result]) -> list[float]:
    """CKA of the encoder through joint SFT, by seed; nothing of a system that skips it."""
    if held[0]["system"] not in JOINT:
        return []
    return [r["cka_through_joint"] for r in held if r["cka_through_joint"] is not None]


def counted(held: Sequence[Result]) -> str:
    return f"{len(held)} seed" + ("s" if len(held) > 1 else "")


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


def _metric(row: Result, name: str) -> float:
    held = row[name]
    return held["value"] if isinstance(held, dict) else held


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


# -- figure ------------------------------------------------------------------------------------


def draw(systems: dict[str, list[Result]], path: Path) -> None:
    """Errors and hallucinations against noise, non-speech, drift, the encoder's metrics, cost."""
    every = [r for held in systems.values() for r in held]
    figure, axes = figures.new(2, 4, (15.5, 7.0))
    conditions = ["clean", *noisy(every)]
    ticks = ["clean", *(f"{c[3:]}" for c in conditions[1:])]
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(systems)}
    for axis, measure, title, label, share in (
        (axes[0][0], errors, "errors", "word and character errors, %", False),
        (axes[0][1], hallucinated, "hallucinations on speech", "utterances, %", True),
    ):
        for i, (name, held) in enumerate(systems.items()):
            ratios = [measure(held, [c]) for c in conditions]
            spans = np.array([span(r, share) for r in ratios])
            at = np.arange(len(conditions)) + 0.09 * (i - (len(systems) - 1) / 2)
            middle = 100 * np.array([value(r) for r in ratios])
            said = f"{held[0]['label']} ({counted(held)})"
            axis.plot(at, middle, ".-", lw=1.2, color=colours[name], label=said)
            axis.vlines(at, 100 * spans[:, 0], 100 * spans[:, 1], color=colours[name], lw=1)
        axis.set_xticks(range(len(conditions)), ticks)
        axis.set_xlabel("noise in the test speech: SNR, dB")
        axis.set_ylabel(label)
        # Of few seeds an interval may be many times its value: the curves are to be seen.
        axis.set_ylim(0, 2 * max(line.get_ydata().max() for line in axis.lines) or 1)
        axis.set_title(f"{title} (95%, cut at the top)", fontsize=10, loc="left")
    bars(axes[0][2], systems, colours)
    dots(axes[0][3], systems, colours, drift, "drift through joint SFT", "CKA, 0 to 1")
    for axis, (key, label, title) in zip(axes[1], figures.METRICS, strict=False):
        for i, (name, held) in enumerate(systems.items()):
            pairs = [(_metric(r["before"], key), _metric(r["after"], key)) for r in held]
            for at, pair in zip(_places(i, len(pairs)), pairs, strict=True):
                axis.plot([at, at], pair, "-", color=colours[name], lw=1)
                axis.plot(at, pair[0], "o", mfc="white", mec=colours[name], ms=6)
                axis.plot(at, pair[1], "o", color=colours[name], ms=6)
        _by_system(axis, systems, f"{title}\n(open: before joint SFT; a pair per seed)", label)
    cost = "audio used, augmented\n(a dot per seed)"
    dots(axes[1][3], systems, colours, lambda held: [r["audio_hours"] for r in held], cost, "hours")
    axes[1][3].set_ylim(0, 1.08 * max(r["audio_hours"] for r in every))
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, fontsize=9, frameon=False)
    figures.save(figure, path)


def bars(axis, systems: dict[str, list[Result]], colours: dict[str, str]) -> None:
    for i, (name, held) in enumerate(systems.items()):
        ratio = invented(held)
        axis.bar(i, value(ratio), 0.6, color=colours[name])
        axis.vlines(i, *span(ratio), color=figures.INK, lw=1)
    _by_system(axis, systems, "text on non-speech", "characters a minute")


def dots(axis, systems, colours, values: Callable[[Sequence[Result]], list[float]], title, label):
    """A dot per seed."""
    for i, (name, held) in enumerate(systems.items()):
        found = values(held)
        axis.plot(_places(i, len(found)), found, "o", color=colours[name], ms=6)
    _by_system(axis, systems, title, label)


def _places(i: int, count: int) -> np.ndarray:
    return i + 0.14 * (np.arange(count) - (count - 1) / 2)


def _by_system(axis, systems, title: str, label: str) -> None:
    axis.set_xticks(range(len(systems)), [h[0]["label"].split()[0] for h in systems.values()])
    axis.set_xlim(-0.6, len(systems) - 0.4)
    axis.set_title(title, fontsize=10, loc="left")
    axis.set_ylabel(label)
    axis.set_xlabel("system")


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
        draw(systems, args.results / f"{folder.name}.png")
        brief.append(f"{folder.name}:\n\n{short(systems)}")
        print(f"== {folder.name}\n\n{text}")
    atomic_write(args.results / "short.md", "\n".join(brief))
    print("\n".join(brief))
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(main))
