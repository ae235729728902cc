"""Pack recordings and their transcripts into WebDataset shards.

python tools/make_shards.py data/train.jsonl --out shards/train
python tools/make_shards.py data/train.jsonl data/test.jsonl --out-root shards
python tools/make_shards.py kaldi/data/train --out shards/train --lang en

Run again after a stop, it makes only what is missing.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from dsasr.data.shards.manifests import read_manifest
from dsasr.data.shards.pack import BAD, PackConfig, pack, shard_size
from dsasr.utils.errors import UserError, run_tool


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "sources",
        nargs="+",
        help="JSONL manifests, Kaldi folders, LibriSpeech or AISHELL-1 trees",
    )
    place = parser.add_mutually_exclusive_group(required=True)
    place.add_argument("--out", type=Path, help="folder of the shards, for one source")
    place.add_argument("--out-root", type=Path, help="folder of folders, named as the sources are")
    parser.add_argument("--kind", default="auto", help="jsonl, kaldi, librispeech, aishell or auto")
    parser.add_argument(
        "--lang", default="", help="language of utterances that name none: en, zh …"
    )
    parser.add_argument(
        "--shard-size", default="500", help="samples a shard, or about so many bytes: 200MB, 1GB"
    )
    parser.add_argument("--keep-order", action="store_true", help="do not shuffle before cutting")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--encode", choices=["flac"], help="re-encode; default: bytes as they are")
    parser.add_argument("--processes", type=int, help="default: one per core")
    args = parser.parse_args()
    samples, size = shard_size(args.shard_size)
    config = PackConfig(samples, not args.keep_order, args.seed, args.encode, size)
    folders = _folders(args.sources, args.out, args.out_root)
    corpora = [read_manifest(source, args.kind, args.lang) for source in args.sources]
    for out, found in zip(folders, corpora, strict=True):
        _tell(out, pack(found.utterances, out, config, args.processes, found.left_out))
    return 0


def _folders(sources: list[str], out: Path | None, root: Path | None) -> list[Path]:
    """Where each source's shards go."""
    if out is not None:
        if len(sources) > 1:
            raise UserError(f"{len(sources)} sources into one folder: use --out-root")
        return [out]
    paths = [Path(source).resolve() for source in sources]
    names = [path.name if path.is_dir() else path.stem for path in paths]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"two sources are called '{name}': pack them apart with --out")
    return [root / name for name in names]


def _tell(out: Path, made: dict) -> None:
    langs = ", ".join(
        f"{k or '?'} {v['samples']} ({v['hours']:.2f} h)" for k, v in made["langs"].items()
    )
    print(
        f"{out}{'' if made['written'] else ' is packed already'}: {made['samples']} samples in "
        f"{len(made['shards'])} shards, {made['hours']:.2f} h, {made['speakers']} speakers; {langs}"
    )
    if made["bad"]:
        print(f"{made['bad']} left out, see {out / BAD}")
    if made["repaired"]:
        print(f"{made['repaired']} durations of the manifest were wrong; the audio's are stored")


if __name__ == "__main__":
    sys.exit(run_tool(main))
