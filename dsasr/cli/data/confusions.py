"""Count a CTC head's errors on shards, for the recipe's data.text_only.confusions.

example:
  dsasr data confusions runs/mine --data shards/valid --out confusions.json
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dsasr.cli.arguments import command_parser


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command_parser(__name__, __doc__)
    parser.add_argument("encoder", help="a run, checkpoint or snapshot with a CTC head")
    parser.add_argument("--data", nargs="+", required=True, help="shards that it did not train on")
    parser.add_argument("--out", type=Path, help="where to write; default: print the errors only")
    parser.add_argument("--utterances", type=int, default=0, help="at most; 0: all")
    args = parser.parse_args(arguments)

    from dsasr.analysis.ctc_errors import count_ctc_errors
    from dsasr.analysis.probed_encoders import max_seconds, open_checkpoint
    from dsasr.data.shards.writer import check_file
    from dsasr.evaluation.eval_sets import read_recordings
    from dsasr.utils.progress import Bar

    if args.out is not None:
        check_file(args.out)
    encoder = open_checkpoint(args.encoder)
    recordings, _ = read_recordings(
        args.data,
        rate=encoder.rate,
        limit=args.utterances,
        max_seconds=max_seconds([args.encoder]),
    )
    errors = count_ctc_errors(encoder, recordings, lambda items: Bar(items, desc="CTC", delay=1))
    units, words = errors.units, errors.words
    print(f"units   {100 * units.rate:5.1f}% wrong of {units.reference:,} (greedy CTC)")
    if words.reference:
        print(f"words   {100 * words.rate:5.1f}% wrong of {words.reference:,}")
    if errors.left_out:
        print(f"{errors.left_out} recordings left out: a unit or word that the run does not know")
    if args.out is not None:
        errors.confusions.save(args.out)
        print(f"{args.out}: confusions of {len(recordings) - errors.left_out} recordings")
