"""Who resolves which part of the uncertainty: NSE, PAI, CSAI, entropies and H0-H1 of checkpoints.

python tools/allocation.py runs/demo/snapshots/encoder-* runs/demo --data corpus/demo/shards/test
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from dsasr.analysis import measure as measures
from dsasr.analysis import probed_encoders
from dsasr.entropy_allocation.v_information import SPIKES, VInformationConfig
from dsasr.evaluation import eval_sets
from dsasr.recipe import quiet
from dsasr.utils.errors import UserError, run_tool
from dsasr.utils.io import atomic_write, read_json_lines, to_json
from dsasr.utils.progress import Bar

Row = dict[str, Any]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "checkpoints", nargs="+",
        help="run folders (their newest checkpoint), checkpoints, snapshots, or folders of Hugging "
        "Face Whisper, wav2vec 2.0 and HuBERT encoders",
    )  # fmt: skip
    parser.add_argument("--data", required=True, help="shards: a folder, a tar or a pattern")
    parser.add_argument(
        "--aligner", help="whose CTC head places the phonemes (default: the last run's)"
    )
    parser.add_argument("--utterances", type=int, default=300, help="of the data, 0: all")
    parser.add_argument("--semantic", choices=("word", "token"), default="word", help="CSAI's S")
    parser.add_argument("--width", type=int, default=1024, help="wider features are projected")
    parser.add_argument(
        "--folds", type=int, default=0,
        help="groups of speakers that are held out in turn; each costs its own probes (default: 1 "
        "with 12 speakers or more, else 4)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--frames", type=int, default=200_000, help="frames for PAI at most; a quarter for CSAI"
    )
    for name, default, what in (
        ("random", "all", "the same encoder with random weights (all: of each architecture)"),
        ("control", "all", "shuffled labels"),
        ("limits", "first", "what would have stood out where nothing is found; slow"),
    ):
        choices = ("all", "first", "none")
        parser.add_argument(f"--{name}", choices=choices, default=default, help=what)
    parser.add_argument(
        "--out", type=Path,
        help="one file of JSON lines for all (default: each run's rows in its allocation.jsonl, "
        "those of other encoders in the aligner's)",
    )  # fmt: skip
    return parser.parse_args()


def probe_set(
    args: argparse.Namespace, aligner: probed_encoders.ProbedEncoder
) -> measures.ProbeSet:
    """The recordings that every checkpoint can read, labeled; tells what was left out."""
    data = aligner.build.recipe.data
    held, bad = eval_sets.read(
        args.data, rate=data.fbank.rate, text=data.text, limit=args.utterances,
        max_seconds=probed_encoders.longest(args.checkpoints),
    )  # fmt: skip
    probes = measures.probe_set(aligner, held, args.semantic)
    left_out = dict(Counter(bad) + probes.causes)
    speakers = len({r.speaker for r in probes.recordings})
    print(f"{len(probes.recordings)} utterances by {speakers} speakers, labels by {aligner.name}"
          + (f"; left out: {left_out}" if left_out else ""))  # fmt: skip
    return probes


def measure(args: argparse.Namespace, probes: measures.ProbeSet) -> list[Row]:
    """A row per checkpoint, each run's and each other architecture's first followed by the same
    encoder with random weights. ``first`` in a row is whom its ``cka_to_first`` is to."""
    rows, reference, seen = [], None, set()
    given = {"max_width": args.width, "folds": args.folds, "seed": args.seed}
    given |= {"max_frames": args.frames, "semantic_frames": max(1, args.frames // 4)}

    def wanted(choice: str, before: bool) -> bool:
        return choice == "all" or (choice == "first" and not before)

    def config(control: bool) -> VInformationConfig:
        limited = any(row[key]["limit"] for row in rows for key in ("pai", "csai"))
        spikes = SPIKES if wanted(args.limits, limited) else ()
        return VInformationConfig(**given, control=control, spikes=spikes)

    with Bar(total=len(args.checkpoints), unit="checkpoint") as bar:
        for place in args.checkpoints:
            subject, later = probed_encoders.open_any(place), bool(rows)
            chosen = config(wanted(args.control, later))
            row, features = measures.measure(subject, probes, chosen, reference)
            rows.append(row | ({"first": rows[0]["name"]} if "cka_to_first" in row else {}))
            kind = subject.about.get("run") or subject.about["path"], row["width"]
            if kind not in seen and wanted(args.random, later):
                seen.add(kind)
                baseline = probed_encoders.random_baseline(subject, seed=args.seed)
                rows.append(measures.measure(baseline, probes, config(args.control == "all"))[0])
            reference = reference if reference is not None else features
            bar.update()
    return rows


def write(rows: Iterable[Row], home: str, measured: Row, out: Path | None) -> None:
    """All rows to ``out``, or each to its run's allocation.jsonl; to ``home``'s if it has none.

    Rows of other checkpoints that were ``measured`` in the same way stay there; other rows, which
    are not to be compared with these, go, and it is said how many."""
    files: dict[Path, list[Row]] = {}
    for row in rows:
        path = out or Path(row.get("run", home)).resolve() / "allocation.jsonl"
        files.setdefault(path, []).append({**row, "measured": measured})
    for path, held in files.items():
        new = {row["name"] for row in held}
        old = [] if out else [r for r in read_json_lines(path) if r["name"] not in new]
        kept = [r for r in old if r.get("measured") == measured]
        atomic_write(path, "".join(to_json(row) + "\n" for row in (*kept, *held)))
        gone = f"; {n} measured otherwise left out" if (n := len(old) - len(kept)) else ""
        print(f"written: {path} ({', '.join(row['name'] for row in held)}{gone})")


def main() -> int:
    args = parse()
    quiet()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    own = [c for c in args.checkpoints if not probed_encoders.is_foreign(c)]
    chosen = args.aligner or (own[-1] if own else None)
    if chosen is None:
        raise UserError("labels need a CTC head: give --aligner a run, checkpoint or snapshot")
    aligner = probed_encoders.open_checkpoint(chosen)
    rows = measure(args, probe_set(args, aligner))
    print(measures.table(rows))
    print("PAI, CSAI: nats a frame, 95% interval, [shuffled], none (<what would have stood out);")
    by, folds = rows[0]["pai"]["split"], rows[0]["pai"]["folds"]
    print("H: nats a token (CTC: frame); CKA: to the first; held out: by " + by
          + (f", in {folds} folds" if folds > 1 else ""))  # fmt: skip
    names = ("data", "utterances", "semantic", "width", "frames", "folds", "seed")
    measured = {name: getattr(args, name) for name in names}
    home = aligner.about["run"]
    measured["aligner"] = str(Path(home).resolve().parent / aligner.name)
    write(rows, home, measured, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(main))
