"""Write an HTML page of shards: histograms, players, the oddest utterances by each measure.

It needs no network. Measured are length, characters a second, level, clipping and an estimate of
the signal-to-noise ratio; counted are languages, speakers, characters and what cannot be read.

examples:
  dsasr data inspect shards/train
  dsasr data inspect shards/train shards/valid --out data.html --shards 0
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from dsasr.cli.arguments import (
    add_overwrite,
    check_new,
    command_parser,
    count,
    positive,
)


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)
    check_new([args.out], args.overwrite)

    import numpy as np

    from dsasr.data.shards.build_index import find_tars
    from dsasr.data.shards.process_pool import map_in_processes
    from dsasr.data.shards.shard_measures import ShardMeasures, measure_shard
    from dsasr.reporting import data_page
    from dsasr.utils.errors import UserError
    from dsasr.utils.io import atomic_write

    tars = find_tars(args.paths)
    spread = np.linspace(0, len(tars) - 1, args.shards or len(tars)).astype(int)
    chosen = [tars[i] for i in dict.fromkeys(spread.tolist())]
    found = ShardMeasures(args.odd, args.players)
    measure = partial(measure_shard, odd=args.odd, random=args.players)
    for of_shard in map_in_processes(measure, chosen, args.processes, desc="listening"):
        found.merge(of_shard)
    if not found.utterances:
        causes = ", ".join(f"{cause} {n}" for cause, n in found.bad.most_common()) or "none there"
        raise UserError(f"no utterance can be read ({causes}): see `dsasr data verify`")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(args.out, data_page.page(", ".join(args.paths), found, len(tars)))
    size = args.out.stat().st_size / 1e6
    print(f"{args.out}: {found.utterances:,} utterances of {found.shards:,} shards, {size:.1f} MB")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = command_parser(__name__, __doc__)
    parser.add_argument("paths", nargs="+", help="tars, or folders of tars")
    parser.add_argument("--out", type=Path, default=Path("data.html"), help="the page (data.html)")
    add_overwrite(parser)
    parser.add_argument(
        "--shards", type=count, default=64, help="that are read, evenly spread; 0: all (64)"
    )
    parser.add_argument("--players", type=count, default=20, help="of utterances at random (20)")
    parser.add_argument(
        "--odd", type=positive, default=50, help="utterances of each measure, from both ends (50)"
    )
    parser.add_argument("--processes", type=int, help="default: one per core")
    return parser.parse_args(arguments)
