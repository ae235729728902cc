"""The phoneme vocabulary of shards, for ``data.phonemes``.

python tools/make_phonemes.py shards/train --out phonemes.json --kind espeak
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tqdm import tqdm

from dsasr.data.phonemes import PhonemeVocab, PhonemizerConfig, build_phonemizer
from dsasr.data.shards import build_index, find_tars, read_sample
from dsasr.errors import run_tool


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("paths", nargs="+", help="tars, or folders of tars")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--kind", default="stored", help="stored (in the shards), espeak or lexicon"
    )
    parser.add_argument("--lexicon", nargs="*", default=(), help="files, for --kind lexicon")
    parser.add_argument("--stress", action="store_true", help="keep stress marks")
    args = parser.parse_args()
    config = PhonemizerConfig(args.kind, tuple(args.lexicon), args.stress)
    phonemizer = build_phonemizer(config)

    def sequences():
        for tar in tqdm(find_tars(args.paths), desc="phonemes", unit="shard"):
            for entry in build_index(tar):
                yield phonemizer.for_sample(read_sample(tar, entry))

    vocab = PhonemeVocab.build(sequences())
    vocab.save(args.out)
    print(f"{args.out}: {len(vocab)} symbols, blank included")
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(main))
