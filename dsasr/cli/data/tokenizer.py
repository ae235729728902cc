"""Train a sentencepiece tokenizer on text files, one sentence a line.

example:
  dsasr data tokenizer corpus/text/lm.txt --out corpus/tokenizer --size 1100
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dsasr.cli.arguments import command_parser


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command_parser(__name__, __doc__)
    parser.add_argument("texts", nargs="+", type=Path, help="text files, one sentence a line")
    parser.add_argument("--out", type=Path, required=True, help="folder for the tokenizer")
    parser.add_argument("--size", type=int, default=1100, help="vocabulary size, at most")
    parser.add_argument("--fresh", action="store_true", help="train even if the folder has one")
    args = parser.parse_args(arguments)

    from dsasr.data.text.train_tokenizer import train_tokenizer

    tokenizer = train_tokenizer(args.texts, args.out, size=args.size, fresh=args.fresh)
    print(f"{args.out}: {tokenizer.vocab_size} tokens")
