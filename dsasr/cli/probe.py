"""Measure entropy allocation of encoders on one probe set: NSE, PAI, CSAI, entropies, H0-H1, CKA.

example:
  dsasr probe runs/demo/snapshots/encoder-* runs/demo --data corpus/demo/shards/test
"""

from __future__ import annotations

import argparse
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from dsasr.cli.arguments import add_overwrite, check_new, command_parser, count, positive
from dsasr.utils.errors import UserError
from dsasr.utils.masking import mask


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = command_parser(__name__, __doc__)
    parser.add_argument(
        "checkpoints", nargs="+",
        help="run folders (their newest checkpoint), checkpoints, averages, snapshots, exported "
        "folders, or folders of Hugging Face Whisper, wav2vec 2.0 and HuBERT encoders",
    )  # fmt: skip
    parser.add_argument("--data", required=True, help="shards: a folder, a tar or a pattern")
    parser.add_argument(
        "--aligner",
        help="the run, checkpoint or snapshot whose CTC head aligns the phonemes (default: the "
        "last one measured)",
    )
    parser.add_argument(
        "--utterances", "--limit", type=count, default=300, help="of the data, 0: all"
    )
    parser.add_argument("--semantic", choices=("word", "token"), default="word", help="CSAI's S")
    parser.add_argument("--width", type=positive, default=1024, help="wider features are projected")
    parser.add_argument(
        "--folds", type=count, default=0,
        help="groups of speakers that are the test part in turn, each with its own probes "
        "(default: 1 with 12 speakers or more, else 4)",
    )  # fmt: skip
    parser.add_argument("--seed", type=count, default=0)
    parser.add_argument(
        "--frames",
        type=positive,
        default=200_000,
        help="frames for PAI at most; a quarter for CSAI",
    )
    for name, default, what in (
        ("random", "all", "the same encoder with random weights (all: of each architecture)"),
        ("control", "all", "the control of shuffled frames"),
        ("limits", "first", "the smallest gain that would be detected where none is; slow"),
    ):
        choices = ("all", "first", "none")
        parser.add_argument(f"--{name}", choices=choices, default=default, help=what)
    parser.add_argument(
        "--out", type=Path,
        help="one file of JSON lines for all (default: each run's rows in its allocation.jsonl, "
        "those of other encoders in the aligner's)",
    )  # fmt: skip
    add_overwrite(parser)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)

    import torch

    from dsasr.analysis import probe_checkpoints, probed_encoders
    from dsasr.analysis.probe_set import label_recordings
    from dsasr.entropy_allocation.pai_csai import VInformationConfig
    from dsasr.evaluation.eval_sets import read_recordings
    from dsasr.utils.library_warnings import silence_library_warnings

    silence_library_warnings()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    check_new([args.out] if args.out else [], args.overwrite)
    runs = [c for c in args.checkpoints if not probed_encoders.has_no_head(c)]
    path = args.aligner or (runs[-1] if runs else None)
    if path is None:
        raise UserError("labels need a CTC head: give --aligner a run, checkpoint or snapshot")
    aligner = probed_encoders.open_checkpoint(path)
    data = aligner.builder.recipe.data
    recordings, bad = read_recordings(
        args.data, rate=aligner.builder.front_end.rate, text=data.text, limit=args.utterances,
        max_seconds=probed_encoders.max_seconds([path, *args.checkpoints]),
    )  # fmt: skip
    probe_set = label_recordings(aligner, recordings, args.semantic)
    left_out = dict(Counter(bad) + probe_set.causes)
    speakers = len({r.speaker for r in probe_set.recordings})
    count, name = len(probe_set.recordings), aligner.source.name
    print(f"{count} utterances by {speakers} speakers, labels by {name}"
          + (f"; left out: {left_out}" if left_out else ""))  # fmt: skip
    config = VInformationConfig(
        max_width=args.width, folds=args.folds, seed=args.seed,
        max_frames=args.frames, semantic_frames=max(1, args.frames // 4),
    )  # fmt: skip
    baselines = probe_checkpoints.Baselines(args.random, args.control, args.limits)
    names = ("data", "utterances", "semantic", "width", "frames", "folds", "seed")
    settings = {name: getattr(args, name) for name in names} | {"data": mask(args.data)}
    home = aligner.source.run
    if home is None and args.out is None:
        raise UserError(f"{path} belongs to no run: give --out a file for the rows")
    settings["aligner"] = str(Path(home or path).resolve().parent / name)
    files = probe_checkpoints.RowFiles(home or "", settings, args.out)
    rows = probe_checkpoints.measure_all(
        args.checkpoints, probe_set, config, baselines, measured=files.write
    )
    print(probe_checkpoints.table(rows))
    print("PAI, CSAI: nats a frame, 95% interval, [controls: shuffled; of CSAI phonemes alone];")
    print("none (<x): not above 0 and the controls, a gain of x would be. PAI is a lower bound,")
    print("CSAI no bound: it counts phonemes that the context's probe missed (see its control).")
    first = rows[0].pai
    folds = f", in {first.folds} folds" if first.folds > 1 else ""
    print(f"H: nats a token (CTC: frame); CKA: to the first; test part: by {first.split_by}{folds}")
    for message in files.messages():
        print(message)
