"""Global mean and variance of the features of shards, for the recipe's data.cmvn.

example:
  dsasr data cmvn shards/train --out cmvn.json
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dsasr.cli.arguments import command_parser
from dsasr.utils.errors import UserError


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command_parser(__name__, __doc__)
    parser.add_argument("paths", nargs="+", help="tars, or folders of tars")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--mels", type=int, default=80)
    parser.add_argument("--shards", type=int, default=0, help="use the first N only; 0: all")
    parser.add_argument("--processes", type=int, help="default: one per core")
    args = parser.parse_args(arguments)
    if args.shards < 0:
        raise UserError(f"--shards {args.shards}: a number of shards, or 0 for all")

    from dsasr.data.shards.build_index import find_tars
    from dsasr.data.shards.statistics import feature_sums
    from dsasr.data.shards.writer import check_file

    tars = find_tars(args.paths)[: args.shards or None]
    check_file(args.out)
    sums, left_out = feature_sums(tars, args.mels, args.processes)
    sums.result().save(args.out)
    print(f"{args.out}: {sums.count} frames of {len(tars)} shards")
    if left_out:
        print(f"left out: {left_out}; `dsasr data verify` names them")
