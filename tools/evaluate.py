"""Decode shards with a trained run: error rates, hallucinations, a paired test with another run.

python tools/evaluate.py runs/demo --data corpus/demo/shards/test
python tools/evaluate.py runs/demo --data corpus/demo/shards/{test,nonspeech} --suite --report
python tools/evaluate.py runs/demo --checkpoint step-0000000450 --data … --out early.jsonl
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from dsasr.evaluation import eval_sets, suite_results
from dsasr.evaluation.hallucination import KINDS
from dsasr.evaluation.normalize import check_rules
from dsasr.evaluation.suite import SuiteConfig
from dsasr.inference.model_from_run import RunModel, events, finished
from dsasr.recipe import quiet
from dsasr.tracking.monitor import clock
from dsasr.utils.errors import UserError, run_tool
from dsasr.utils.io import atomic_write, to_json
from dsasr.utils.progress import Bar

TRANSCRIPTS = "transcripts.jsonl"


def stage_rows(folder: Path) -> list[tuple[str, int, float]]:
    """(stage, steps of the run at its end, seconds spent in it), in the order of their ends."""
    ends = [e for e in events(folder) if e["event"] == "stage_end"]
    return [(e["name"], e["steps"], e["stage_seconds"]) for e in ends]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="a run folder")
    parser.add_argument(
        "--data", nargs="+", help="shards: folders, tars or patterns; samples without text count "
        "as non-speech",
    )  # fmt: skip
    parser.add_argument(
        "--checkpoint", default="", help="a name below RUN/checkpoints, or a path (default: the "
        "newest)",
    )  # fmt: skip
    parser.add_argument("--beam", type=int, default=0, help="1 is greedy (default: the recipe's)")
    parser.add_argument("--limit", type=int, default=0, help="utterances, spread over the set")
    parser.add_argument(
        "--suite", action="store_true",
        help="also made non-speech, noise at 20, 10, 5 and 0 dB, and truncated speech",
    )  # fmt: skip
    parser.add_argument(
        "--rules", help="normalization: standard, plain (digit strings), or the path of a Whisper "
        "checkpoint's normalizer.json (default: the recipe's)",
    )  # fmt: skip
    parser.add_argument("--clips", type=int, default=10, help="of each made non-speech sound")
    parser.add_argument("--pairs", type=int, default=5, help="reference/hypothesis pairs to print")
    parser.add_argument(
        "--against", type=Path, help="paired test: a run evaluated with --report, or its --out"
    )
    parser.add_argument("--out", type=Path, help="write all transcripts as JSON lines")
    parser.add_argument(
        "--report", action="store_true", help=f"write RUN/report.json and RUN/{TRANSCRIPTS}"
    )
    parser.add_argument(
        "--is-finished", action="store_true", help="only say so by exit code 0 or 1"
    )
    args = parser.parse_args()
    if not args.is_finished and not args.data:
        parser.error("--data is needed")
    if args.checkpoint and args.report:
        parser.error("--report speaks of the run's end: write those of a --checkpoint with --out")
    return args


UNITS = {"word": "words", "char": "characters", "mixed": "words and characters"}


def percent(rate: float | None) -> str:
    """A fraction in percent; "–" for a rate that does not exist."""
    return "–" if rate is None else f"{100 * rate:.2f}"


def pace(row: dict) -> str:
    """One row of `Trials.nonspeech` in words."""
    if not row["clips_with_text"]:
        return f"0 characters a minute of non-speech (no text in {row['clips']} clips)"
    span = "" if row["low"] is None else f" ({row['low']:.1f}…{row['high']:.1f})"
    told = f"{row['rate']:.1f} characters a minute of non-speech{span}"
    return f"{told}, text in {row['clips_with_text']} of {row['clips']} clips"


def tell(found: suite_results.Trials, summary: dict, pairs: int) -> None:
    """Error rates and hallucinations by condition, and some transcripts."""
    for condition, part in summary["conditions"].items():
        for lang, row in part["languages"].items():
            print(
                f"{condition:>9} {lang:>6}: {percent(row['rate']):>6}% errors "
                f"({percent(row['low'])}…{percent(row['high'])}) of {row['units']} "
                f"{UNITS[row['unit']]}: {row['substitutions']} sub, {row['deletions']} del, "
                f"{row['insertions']} ins"
            )
    for row in summary["hallucination"]["rows"]:
        where = f"{row['condition']:>9} {row['lang']:>6}"
        if row["utterances"]:
            kinds = ", ".join(f"{row[k]} {k}" for k in KINDS)
            print(f"{where}: {row['flagged']} of {row['utterances']} hallucinated ({kinds})")
    for condition, row in summary["hallucination"]["nonspeech"].items():
        print(f"{condition:>9} {'':>6}: {pace(row)}")
    for example in summary["hallucination"]["examples"][:pairs]:
        head = f"{example['kind']} ({example['condition']}, {example['detail']})"
        print(f"  {head}\n    ref  {example['reference']}\n    hyp  {example['hypothesis']}")
    clean = [row for row in found.rows if row.condition == "clean"]
    for row in clean[:: max(len(clean) // max(pairs, 1), 1)][:pairs]:
        print(f"  ref  {row.reference}\n  hyp  {row.hypothesis}")


def against(found: suite_results.Trials, other: Path, rules: str) -> dict:
    path = other / TRANSCRIPTS if other.is_dir() else other
    tests = suite_results.compare(suite_results.read(path), found, rules)
    print(f"against {other}: (this less that)")
    for condition, row in tests.items():
        line = f"{condition:>9}: hallucinated {row['flagged_b']:.0f} to {row['flagged_a']:.0f}"
        line += f", p {row['flagged_p']:.3f}"
        if "difference" in row:
            span = f"{100 * row['low']:+.2f}…{100 * row['high']:+.2f}"
            line += f"; errors {100 * row['difference']:+.2f} ({span}), p {row['p_value']:.3f}"
        if "characters_difference" in row:
            span = f"{row['characters_low']:+.1f}…{row['characters_high']:+.1f}"
            line += f"; characters/min {row['characters_difference']:+.1f} ({span})"
            line += f", p {row['characters_p_value']:.3f}"
        print(line)
    return tests


def main() -> int:
    args = parse()
    if args.is_finished:
        return 0 if finished(args.run) else 1
    quiet()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    recognizer = RunModel.from_run(args.run, args.checkpoint)
    recipe = recognizer.build.recipe
    rules = args.rules or recipe.evaluation.rules
    try:
        check_rules(rules)
    except ValueError as error:
        raise UserError(f"--{error}") from None
    held, left_out = eval_sets.read(
        args.data,
        rate=recipe.data.fbank.rate,
        text=recipe.data.text,
        source=recipe.data.dataloader.source,
        limit=args.limit,
    )
    if left_out:
        print(f"left out: {dict(left_out)}")
    config = replace(SuiteConfig(), clips=args.clips) if args.suite else suite_results.PLAIN
    bar = partial(Bar, desc="decoding", unit="batch", delay=2)
    found = recognizer.hear(held, config, beam=args.beam, progress=bar)
    summary = found.summary(rules)
    tell(found, summary, args.pairs)
    if args.against:
        summary["against"] = {
            "run": str(args.against),
            "tests": against(found, args.against, rules),
        }
    if args.out:
        atomic_write(args.out, found.text())
    if args.report:
        stages = stage_rows(args.run)
        rows = [dict(zip(("stage", "steps", "seconds"), row, strict=True)) for row in stages]
        data = args.data[0] if len(args.data) == 1 else args.data
        values = {**summary, "data": data, "beam": args.beam, "stages": rows}
        atomic_write(args.run / TRANSCRIPTS, found.text())
        atomic_write(args.run / "report.json", to_json(values, indent=1) + "\n")
        for name, _, seconds in stages:
            print(f"stage {name:<10} {clock(seconds)}")
    rates = "  ".join(
        f"{k.upper()} {100 * summary[k]:.2f}%" for k in ("wer", "cer", "mer") if k in summary
    )
    print(f"{len(found.rows)} clips: {rates}   ({recognizer.checkpoint})")
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(main))
