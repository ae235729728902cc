"""Pack recordings and their transcripts into WebDataset shards.

python tools/make_shards.py data/train.jsonl --out shards/train
python tools/make_shards.py kaldi/data/train --out shards/train --lang en
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from dsasr.data.manifests import read_manifest
from dsasr.data.packing import PackConfig, pack, shard_size
from dsasr.errors import run_tool


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "source", help="a JSONL manifest, a Kaldi folder, a LibriSpeech or AISHELL-1 tree"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the shards")
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
    found = read_manifest(args.source, args.kind, args.lang)
    made = pack(found.utterances, args.out, config, args.processes, found.left_out)
    langs = ", ".join(
        f"{k or '?'} {v['samples']} ({v['hours']:.2f} h)" for k, v in made["langs"].items()
    )
    print(
        f"{args.out}: {made['samples']} samples in {len(made['shards'])} shards, "
        f"{made['hours']:.2f} h, {made['speakers']} speakers; {langs}"
    )
    if made["bad"]:
        print(f"{made['bad']} left out, see {args.out / 'bad_samples.jsonl'}")
    if made["repaired"]:
        print(f"{made['repaired']} durations of the manifest were wrong; the audio's are stored")
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(main))
