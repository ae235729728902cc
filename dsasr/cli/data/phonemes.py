"""The phoneme vocabulary of shards, for the recipe's data.phonemes.

example:
  dsasr data phonemes shards/train --out phonemes.json --kind espeak
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dsasr.cli.arguments import command_parser


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command_parser(__name__, __doc__)
    parser.add_argument("paths", nargs="+", help="tars, or folders of tars")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--kind", default="stored",
        help="stored (in the shards), espeak, lexicon, characters or tokens",
    )  # fmt: skip
    parser.add_argument("--tokenizer", type=Path, help="the language model's, for --kind tokens")
    parser.add_argument("--lexicon", nargs="*", default=(), help="files, for --kind lexicon")
    parser.add_argument("--stress", action="store_true", help="keep stress marks")
    args = parser.parse_args(arguments)

    from dsasr.data.shards.build_index import find_tars
    from dsasr.data.shards.statistics import unit_vocab
    from dsasr.data.shards.writer import check_file
    from dsasr.data.text.build_phonemizer import PhonemizerConfig, build_phonemizer
    from dsasr.data.text.tokenizers import load_tokenizer

    config = PhonemizerConfig(args.kind, tuple(args.lexicon), args.stress)
    tokenizer = load_tokenizer(args.tokenizer) if args.tokenizer else None
    phonemizer, tars = build_phonemizer(config, tokenizer), find_tars(args.paths)
    check_file(args.out)
    vocab, causes, unknown = unit_vocab(tars, phonemizer)
    vocab.save(args.out)
    print(f"{args.out}: {len(vocab)} symbols, blank included")
    for lang, count in unknown.items():
        print(f"{count} samples of language '{lang}', which espeak-ng does not know, were read "
              "as English: give them a code such as de or pt-BR")  # fmt: skip
    if causes:
        counts = ", ".join(f"{cause} {n}" for cause, n in causes.most_common(10))
        print(f"{causes.total()} samples left out: {counts}")
