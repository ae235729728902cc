"""Build a small Qwen3-shaped language model and pre-train it on text, one sentence a line.

example:
  dsasr demo lm corpus/text/lm.txt --tokenizer corpus/tokenizer --out corpus/lm
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dsasr.cli.arguments import command_parser


def main(arguments: Sequence[str] | None = None) -> None:
    from dsasr.data.text.build_phonemizer import PhonemizerConfig, build_phonemizer
    from dsasr.demo.small_lm import SmallLmConfig, make_small_lm

    default = SmallLmConfig()
    parser = command_parser(__name__, __doc__)
    parser.add_argument("texts", nargs="+", type=Path, help="text files, one sentence a line")
    parser.add_argument("--tokenizer", type=Path, required=True, help="its folder")
    parser.add_argument("--out", type=Path, required=True, help="folder for the model")
    parser.add_argument("--heldout", type=Path, help="text to report perplexity on")
    for name in ("hidden", "layers", "heads", "kv_heads", "head_dim", "ffn", "steps", "batch"):
        option = "--" + name.replace("_", "-")
        parser.add_argument(option, type=int, default=getattr(default, name))
    parser.add_argument("--lr", type=float, default=default.lr, help="highest learning rate")
    parser.add_argument("--seed", type=int, default=default.seed)
    parser.add_argument(
        "--reads", choices=["espeak", "lexicon"], help="teach it to read sounds, by these phonemes"
    )
    parser.add_argument("--lexicon", nargs="*", default=(), help="files, for --reads lexicon")
    parser.add_argument("--fresh", action="store_true", help="train even if the model is there")
    args = vars(parser.parse_args(arguments))
    texts, tokenizer, out = args.pop("texts"), args.pop("tokenizer"), args.pop("out")
    heldout, fresh = args.pop("heldout"), args.pop("fresh")
    reads, lexicons = args.pop("reads"), tuple(args.pop("lexicon"))
    phonemizer = build_phonemizer(PhonemizerConfig(reads, lexicons)) if reads else None
    report = make_small_lm(
        texts, tokenizer, out, SmallLmConfig(**args),
        heldout=heldout, phonemizer=phonemizer, fresh=fresh,
    )  # fmt: skip
    print(
        f"{out}: {report['parameters'] / 1e6:.2f} M parameters, held-out perplexity "
        f"{report['heldout_perplexity']:.2f} per token, trained in {report['seconds']:.0f} s"
    )
