"""Index shards that other tools made, so that they can be trained on as they are.

Writes NAME.index.json beside each NAME.tar, and dataset.json where a folder is named.

examples:
  dsasr data index shards/wenet --fields text=.txt default_lang=zh   (KEY.wav and KEY.txt)
  dsasr data index shards/emilia --fields lang=language              (KEY.mp3 and KEY.json)
  dsasr data index shards/mine                                       (again, after a change)
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
    parser.add_argument(
        "--fields", nargs="*", default=[], metavar="NAME=WHERE",
        help="where text, lang, speaker and duration stand: a key of the json member, or for text "
        "an ending (.txt); default_lang: of samples that name none",
    )  # fmt: skip
    parser.add_argument("--processes", type=int, help="default: one per core")
    args = parser.parse_args(arguments)

    from dsasr.data.shards.build_index import find_tars
    from dsasr.data.shards.process_pool import map_in_processes
    from dsasr.data.shards.sample import SampleFields
    from dsasr.data.shards.writer import index_shard, write_dataset

    pairs = [item.partition("=")[::2] for item in args.fields]
    try:
        fields = SampleFields(**dict(pairs)) if pairs else None
    except TypeError:
        names = ", ".join(SampleFields.__dataclass_fields__)
        raise UserError(f"--fields {' '.join(args.fields)}: use {names}, each with =") from None
    tars = find_tars(args.paths)
    causes: Counter[str] = Counter()
    summaries = {}
    for tar, (summary, bad) in zip(
        tars,
        map_in_processes(partial(index_shard, fields=fields), tars, args.processes, "indexing"),
        strict=True,
    ):
        summaries[tar] = summary
        causes.update(bad)
    samples = sum(summary["samples"] for summary in summaries.values())
    counts = ", ".join(f"{cause} {n}" for cause, n in causes.most_common())
    if not samples:
        raise UserError(f"no sample in {len(tars)} shards ({counts or 'no audio'}): see --fields")
    for folder in filter(Path.is_dir, map(Path, args.paths)):
        write_dataset(folder, [row for tar, row in summaries.items() if tar.parent == folder], 0)
    hours = sum(summary["seconds"] for summary in summaries.values()) / 3600
    print(f"{len(tars)} shards, {samples} samples, {hours:.2f} h")
    if causes:
        print(f"left out: {counts}; `dsasr data verify` names them")
