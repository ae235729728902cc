"""Train a sentencepiece tokenizer on text files, one sentence a line.

python tools/train_tokenizer.py corpus/text/lm.txt --out corpus/tokenizer --size 1100
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from dsasr.data.text.train_tokenizer import train_tokenizer
from dsasr.utils.errors import run_tool


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("texts", nargs="+", type=Path, help="text files, one sentence a line")
    parser.add_argument("--out", type=Path, required=True, help="folder for the tokenizer")
    parser.add_argument("--size", type=int, default=1100, help="vocabulary size, at most")
    parser.add_argument("--fresh", action="store_true", help="train even if the folder has one")
    args = parser.parse_args()
    tokenizer = train_tokenizer(args.texts, args.out, size=args.size, fresh=args.fresh)
    print(f"{args.out}: {tokenizer.vocab_size} tokens")


if __name__ == "__main__":
    sys.exit(run_tool(main))
