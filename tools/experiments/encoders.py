"""What the experiment's encoders hold, with all controls of the probes, and nothing else of it.

python tools/experiments/encoders.py --corpus corpus/experiment/synth \\
    --runs runs/experiment/synth --probe 'corpus/experiment/probe/shards/*/*.tar'

Trains, or takes from --runs, the pretrainings of every seed and the systems whose joint SFT trains
the encoder from its start (late joint SFT leaves it as it is: CKA 0.998), and probes them. Each
has both controls: shuffled frames, and features that tell of the phonemes alone. Writes
results/encoders-SET.jsonl, a row for each encoder as it is measured, and results/encoders-SET.md.
The corpora are those of tools/reproduce.sh.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import systems
from reproduce import CONTROLLED, RESULTS, run_dsasr, train, train_system, without_paths
from systems import PRETRAININGS, SHORT, SIZES, SYSTEMS, Pretraining

from dsasr.entropy_allocation.allocation_row import AllocationRow, Estimate
from dsasr.utils.errors import run_tool
from dsasr.utils.io import atomic_write, read_json_lines

LABELS = {
    "characters": "character CTC", "phonemes": "phoneme CTC", "phonemes-cr": "phoneme CR-CTC",
}  # fmt: skip
COLUMNS = (
    "encoder", "seed", "PAI", "shuffled", "CSAI", "shuffled", "phonemes alone", "found",
)  # fmt: skip


def measure(
    args: argparse.Namespace, pretraining: Pretraining, seed: int, aligner: Future[Path]
) -> Iterator[tuple[str, AllocationRow]]:
    """(name, row) of the encoder that a pretraining ends with, of those after joint SFT from its
    start, and once of a random one."""
    run = args.runs / f"seed{seed}" / pretraining.name
    values = systems.pretraining(pretraining, args.kind, args.sizes, seed, args.corpus, run)
    pretrain = train(values, args.ranks)
    joint = [s for s in SYSTEMS if s.pretraining == pretraining and s.joint == "whole"]
    trained = [train_system(args, system, seed, pretrain) for system in joint]
    last = max(run.glob("snapshots/encoder-*"))
    out = run.with_suffix(".encoders.jsonl")
    random = "first" if (pretraining, seed) == (PRETRAININGS[0], CONTROLLED) else "none"
    run_dsasr(
        "probe", last, *(t.checkpoint for t in trained), "--data", args.probe, "--aligner",
        aligner.result(), "--utterances", args.utterances, "--control", "all", "--random", random,
        "--limits", "none", "--out", out, "--overwrite",
    )  # fmt: skip
    label = LABELS[pretraining.name]
    names = iter([label, *[f"{label}, joint SFT" for _ in trained]])
    for values in read_json_lines(out):
        row = without_paths(AllocationRow.from_json(values))
        yield ("random" if row.encoder.kind == "random" else next(names)), row


def table(rows: list[dict]) -> str:
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + " --- |" * len(COLUMNS)]
    for row in sorted(rows, key=lambda r: (r["encoder"], r["seed"])):
        values = AllocationRow.from_json(row["row"])
        found = "yes" if values.csai.detected else "no"
        cells = (
            row["encoder"], row["seed"], interval(values.pai), f"{values.pai.shuffled:.3f}",
            interval(values.csai), f"{values.csai.shuffled:.3f}",
            f"{values.csai.phoneme_only:.3f}", found,
        )  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def interval(estimate: Estimate) -> str:
    return f"{estimate.value:.3f} ({estimate.low:.3f} to {estimate.high:.3f})"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--set", choices=sorted(SIZES), default="synth", dest="kind")
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--runs", type=Path, required=True, help="folder of the run folders")
    parser.add_argument("--probe", required=True, help="shards of the probe set")
    parser.add_argument("--utterances", type=int, default=500, help="of the probe set; 0: all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="at once")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--short", action="store_true", help="a few steps a stage: no result")
    args = parser.parse_args()
    args.sizes, args.ranks = SHORT if args.short else SIZES[args.kind], 1
    args.runs.mkdir(parents=True, exist_ok=True)
    out = args.results / f"encoders-{args.kind}.jsonl"
    rows = read_json_lines(out)
    one_at_a_time = threading.Lock()

    def family(pretraining: Pretraining, seed: int, aligner: Future[Path]) -> None:
        measured = dict(measure(args, pretraining, seed, aligner))
        with one_at_a_time:
            replaced = {(name, seed) for name in measured}
            rows[:] = [r for r in rows if (r["encoder"], r["seed"]) not in replaced]
            for name, row in measured.items():
                known = {"encoder": name, "seed": seed, "when": time.strftime("%Y-%m-%d")}
                rows.append(known | {"row": row.to_json()})
                print(name, f"seed {seed}:", interval(row.pai), interval(row.csai), flush=True)
            atomic_write(out, "".join(json.dumps(r, allow_nan=False) + "\n" for r in rows))
            atomic_write(out.with_suffix(".md"), table(rows))

    with ThreadPoolExecutor(args.jobs) as pool:
        values = systems.aligner(args.kind, args.sizes, args.corpus, args.runs / "aligner")
        aligner = pool.submit(train, values, args.ranks)
        jobs = [(p, s) for s in args.seeds for p in PRETRAININGS]
        futures = [aligner, *(pool.submit(family, *job, aligner) for job in jobs)]
        for future in futures:
            future.result()
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(main))
