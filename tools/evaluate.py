"""Decode shards with a trained run and print error rates.

python tools/evaluate.py runs/demo --data corpus/demo/shards/test
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from pathlib import Path

import torch

from dsasr.errors import run_tool
from dsasr.files import atomic_write
from dsasr.monitor import clock
from dsasr.recipe import quiet
from dsasr.recogniser import Recogniser, events, finished


def stage_rows(folder: Path) -> list[tuple[str, int, float]]:
    """(stage, steps of the run at its end, seconds spent in it), in the order of their ends."""
    ends = [e for e in events(folder) if e["event"] == "stage_end"]
    return [(e["name"], e["steps"], e["stage_seconds"]) for e in ends]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="a run folder")
    parser.add_argument("--data", help="shards: a folder, a tar or a pattern")
    parser.add_argument("--beam", type=int, default=1, help="1 is greedy")
    parser.add_argument("--pairs", type=int, default=5, help="reference/hypothesis pairs to print")
    parser.add_argument("--out", type=Path, help="write all transcripts as JSON lines")
    parser.add_argument("--report", action="store_true", help="write RUN/report.json")
    parser.add_argument(
        "--is-finished", action="store_true", help="only say so by exit code 0 or 1"
    )
    args = parser.parse_args()
    if args.is_finished:
        return 0 if finished(args.run) else 1
    if not args.data:
        parser.error("--data is needed")
    quiet()
    torch.set_num_threads(os.cpu_count() or 1)
    recogniser = Recogniser.from_run(args.run)
    found = recogniser.transcribe_shards(args.data, beam=args.beam)
    scores = found.scores(recogniser.build.recipe.evaluation.rules)
    summary = {k: v for k, v in scores.summary().items() if not math.isnan(v)}
    for lang, part in scores.by_lang.items():
        size = f"{part.counts.reference} {part.unit}s"
        print(f"{lang:>6}: {100 * part.rate:.2f}% errors of {size}")
    for row in found.rows[:: max(len(found.rows) // max(args.pairs, 1), 1)][: args.pairs]:
        print(f"  ref  {row.reference}\n  hyp  {row.hypothesis}")
    if args.out:
        lines = [json.dumps(vars(row), ensure_ascii=False) + "\n" for row in found.rows]
        atomic_write(args.out, "".join(lines))
    stages = stage_rows(args.run)
    if args.report:
        rows = [dict(zip(("stage", "steps", "seconds"), row, strict=True)) for row in stages]
        values = {**summary, "data": args.data, "beam": args.beam, "stages": rows}
        atomic_write(args.run / "report.json", json.dumps(values, indent=1) + "\n")
        for name, _, seconds in stages:
            print(f"stage {name:<10} {clock(seconds)}")
    rates = "  ".join(
        f"{k.upper()} {100 * summary[k]:.2f}%" for k in ("wer", "cer") if k in summary
    )
    print(f"{len(found.rows)} utterances: {rates}   ({recogniser.checkpoint})")
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(main))
