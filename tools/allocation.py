"""Who resolves which part of the uncertainty: NSE, PAI, CSAI, entropies and H0-H1 of checkpoints.

python tools/allocation.py runs/demo/snapshots/encoder-* runs/demo --data corpus/demo/shards/test
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from dsasr import measuring
from dsasr.allocation.accessible import AccessibleConfig
from dsasr.errors import UserError, run_tool
from dsasr.evaluation import recordings
from dsasr.files import atomic_write
from dsasr.recipe import quiet


def main() -> int:
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
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-random", action="store_true", help="leave out the random encoder")
    parser.add_argument("--no-control", action="store_true", help="leave out shuffled labels")
    parser.add_argument(
        "--out", type=Path, help="JSON lines (default: allocation.jsonl in the run)"
    )
    args = parser.parse_args()
    quiet()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    own = [c for c in args.checkpoints if not (Path(c) / "config.json").is_file()]
    chosen = args.aligner or (own[-1] if own else None)
    if chosen is None:
        raise UserError("labels need a CTC head: give --aligner a run, checkpoint or snapshot")
    aligner = measuring.open_checkpoint(chosen)
    data = aligner.build.recipe.data
    held, bad = recordings.read(
        args.data, rate=data.fbank.rate, text=data.text, limit=args.utterances
    )
    probes = measuring.probe_set(aligner, held, args.semantic)
    left_out = {**bad, **probes.causes}
    speakers = len({r.speaker for r in probes.recordings})
    print(f"{len(probes.recordings)} utterances by {speakers} speakers, labels by {aligner.name}"
          + (f"; left out: {left_out}" if left_out else ""))  # fmt: skip
    config = AccessibleConfig(max_width=args.width, control=not args.no_control, seed=args.seed)
    rows, reference, seen = [], None, set()
    with tqdm(total=len(args.checkpoints), unit="checkpoint", file=sys.stderr) as bar:
        for place in args.checkpoints:
            subject = measuring.open_any(place)
            row, features = measuring.measure(subject, probes, config, reference)
            rows.append(row)
            reference = reference if reference is not None else features
            shape = subject.about.get("path", "native"), row["width"]
            if not args.no_random and shape not in seen:
                seen.add(shape)
                baseline = measuring.random_baseline(subject, seed=args.seed)
                rows.append(measuring.measure(baseline, probes, config)[0])
            bar.update()
    print(measuring.table(rows))
    print("PAI, CSAI: nats a frame, 95% interval, [shuffled]; H: nats a token (CTC: frame);")
    print(f"CKA: to the first; speakers held out: {rows[0]['pai']['split'] == 'speaker'}")
    out = args.out or measuring.run_folder(Path(chosen)) / "allocation.jsonl"
    lines = [json.dumps({**row, "data": args.data}, ensure_ascii=False) + "\n" for row in rows]
    atomic_write(out, "".join(lines))
    print(f"written: {out}")
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(main))
