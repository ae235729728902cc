"""Read and decode every sample of shards; list each bad one by shard, key and cause.

The exit code is 1 if any is bad.

example:
  dsasr data verify shards/train
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from dsasr.cli.arguments import command_parser


def main(arguments: Sequence[str] | None = None) -> int:
    parser = command_parser(__name__, __doc__)
    parser.add_argument("paths", nargs="+", help="tars, or folders of tars")
    parser.add_argument("--allow-empty-text", action="store_true", help="for non-speech sets")
    parser.add_argument("--json", action="store_true", help="one JSON line instead of text")
    parser.add_argument("--processes", type=int, help="default: one per core")
    args = parser.parse_args(arguments)

    from dsasr.data.shards.build_index import find_tars
    from dsasr.data.shards.verify import check_dataset, verify
    from dsasr.data.shards.writer import DATASET

    tars = find_tars(args.paths)
    verdicts, causes = verify(tars, args.processes, args.allow_empty_text)
    rows = [row for verdict in verdicts for row in verdict.bad]
    for folder in map(Path, args.paths):
        if (folder / DATASET).is_file():
            shards = {t.name: v for t, v in zip(tars, verdicts, strict=True) if t.parent == folder}
            mismatches = check_dataset(folder, shards)
            rows += mismatches
            causes.update(row[0] for row in mismatches)
    good = sum(v.samples for v in verdicts)
    hours = sum(v.seconds for v in verdicts) / 3600
    if args.json:
        names = ("cause", "shard", "key", "detail")
        bad = [dict(zip(names, row, strict=True)) for row in rows]
        print(json.dumps({"good": good, "hours": hours, "bad": bad, "causes": dict(causes)}))
    else:
        for cause, shard, key, detail in rows:
            print(f"{shard}\t{key}\t{cause}\t{detail}")
        counts = ", ".join(f"{k} {n}" for k, n in causes.most_common()) or "none"
        print(f"{len(verdicts)} shards, {good} good samples, {hours:.2f} h; bad: {counts}")
    return 1 if rows else 0
