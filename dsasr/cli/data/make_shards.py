"""Pack recordings and their transcripts into WebDataset shards.

Run again after a stop, it packs only what is missing.

Read are JSONL manifests (id, audio, text …), those of NeMo, FunASR, SLAM-LLM, ms-swift, WeNet and
lhotse (cuts), Kaldi folders, Common Voice tables, audio folders and Parquet files of Hugging Face,
and LibriSpeech and AISHELL-1 trees, unpacked or as downloaded.

examples:
  dsasr data make-shards data/train.jsonl --out shards/train
  dsasr data make-shards data/train.jsonl data/test.jsonl --out-root shards
  dsasr data make-shards data_aishell.tgz --split train --out shards/train
  dsasr data make-shards kaldi/data/train --out shards/train --lang en
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dsasr.cli.arguments import command_parser
from dsasr.utils.errors import UserError


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command_parser(__name__, __doc__)
    parser.add_argument(
        "sources",
        nargs="+",
        help="manifests, folders or archives of a corpus",
    )
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--out", type=Path, help="folder of the shards, for one source")
    target.add_argument("--out-root", type=Path, help="folder of folders, named as the sources are")
    parser.add_argument(
        "--kind", default="auto", help="the form, such as nemo or kaldi (default: recognized)"
    )
    parser.add_argument(
        "--split", default="", help="train, dev, test …, where a source holds several"
    )
    parser.add_argument(
        "--lang", default="", help="language of utterances that name none: en, zh …"
    )
    parser.add_argument(
        "--shard-size", default="500", help="samples a shard, or bytes, about: 200MB, 1GB"
    )
    parser.add_argument("--keep-order", action="store_true", help="do not shuffle before cutting")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--encode", choices=["flac"], help="re-encode; default: bytes as they are")
    parser.add_argument("--processes", type=int, help="default: one per core")
    args = parser.parse_args(arguments)

    from dsasr.data.manifests.registry import read_manifest
    from dsasr.data.shards.pack import PackConfig, pack, shard_size

    samples, size = shard_size(args.shard_size)
    config = PackConfig(samples, not args.keep_order, args.seed, args.encode, size)
    folders = _folders(args.sources, args.out, args.out_root)
    # Audio of archives is unpacked beside the shards, and removed when it is packed.
    scratch = [out.parent / f".{out.name}.unpacked.tmp" for out in folders]
    try:
        for folder in scratch:
            shutil.rmtree(folder, ignore_errors=True)  # of a packer that was killed
        corpora = [
            read_manifest(source, args.kind, args.lang, args.split, folder)
            for source, folder in zip(args.sources, scratch, strict=True)
        ]
        for out, corpus in zip(folders, corpora, strict=True):
            summary = pack(corpus.utterances, out, config, args.processes, corpus.left_out)
            _print(out, summary)
    finally:
        for folder in scratch:
            shutil.rmtree(folder, ignore_errors=True)


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


def _print(out: Path, summary: Mapping[str, Any]) -> None:
    from dsasr.data.shards.pack import BAD

    langs = ", ".join(
        f"{k or '?'} {v['samples']} ({v['hours']:.2f} h)" for k, v in summary["langs"].items()
    )
    state = "" if summary["written"] else " is packed already"
    print(
        f"{out}{state}: {summary['samples']} samples in {len(summary['shards'])} shards, "
        f"{summary['hours']:.2f} h, {summary['speakers']} speakers; {langs}"
    )
    if summary["bad"]:
        print(f"{summary['bad']} left out, see {out / BAD}")
    if summary["repaired"]:
        print(f"{summary['repaired']} durations of the manifest were wrong; the audio's are stored")
