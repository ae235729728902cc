"""Global mean and variance of the features of shards, for the recipe's data.cmvn.

example:
  dsasr data cmvn shards/train --out cmvn.json
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial
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

    from dsasr.data.audio.features import CmvnSums, FbankConfig
    from dsasr.data.shards.build_index import find_tars
    from dsasr.data.shards.process_pool import map_in_processes
    from dsasr.data.shards.verify import cmvn_sums
    from dsasr.data.shards.writer import check_file

    work = partial(cmvn_sums, config=FbankConfig(mels=args.mels))
    tars = find_tars(args.paths)[: args.shards or None]
    check_file(args.out)
    sums, causes = CmvnSums(args.mels), Counter()
    for part, bad in map_in_processes(work, tars, args.processes, "features"):
        sums.merge(part)
        causes.update(bad)
    counts = ", ".join(f"{cause} {n}" for cause, n in causes.most_common())
    if not sums.count:
        raise UserError(f"no frames in {len(tars)} shards ({counts or 'all samples are short'})")
    sums.result().save(args.out)
    print(f"{args.out}: {sums.count} frames of {len(tars)} shards")
    if causes:
        print(f"left out: {counts}; `dsasr data verify` names them")
