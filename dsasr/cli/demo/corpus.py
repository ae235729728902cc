"""Synthesize the demo's bilingual speech corpus: grammar sentences spoken by synthetic voices.

example:
  dsasr demo corpus --out corpus/demo --hours 1.5
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from dsasr.cli.arguments import command_parser


def main(arguments: Sequence[str] | None = None) -> None:
    from dsasr.demo.corpus import CorpusConfig, make_corpus

    default = CorpusConfig()
    parser = command_parser(__name__, __doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the corpus")
    parser.add_argument("--hours", type=float, default=default.hours, help="of training speech")
    parser.add_argument("--seed", type=int, default=default.seed)
    parser.add_argument(
        "--english-share", type=float, default=default.english, help="the rest is Mandarin"
    )
    parser.add_argument(
        "--mixed-share", type=float, default=default.mixed, help="code-switched sentences"
    )
    parser.add_argument("--valid", type=int, default=default.valid, help="utterances")
    parser.add_argument("--test", type=int, default=default.test, help="utterances")
    parser.add_argument("--nonspeech", type=int, default=default.nonspeech, help="recordings")
    parser.add_argument("--text", type=int, default=default.text, help="sentences for the LM")
    parser.add_argument("--processes", type=int, default=None, help="default: one per core")
    parser.add_argument("--fresh", action="store_true", help="synthesize it even if it is there")
    args = parser.parse_args(arguments)
    config = CorpusConfig(
        hours=args.hours,
        seed=args.seed,
        english=args.english_share,
        mixed=args.mixed_share,
        valid=args.valid,
        test=args.test,
        nonspeech=args.nonspeech,
        text=args.text,
    )
    start = time.monotonic()
    summary = make_corpus(config, args.out, processes=args.processes, fresh=args.fresh)
    for split, figures in summary["splits"].items():
        languages = ", ".join(f"{lang} {n}" for lang, n in figures["languages"].items())
        print(
            f"{split:>9}: {figures['utterances']} utterances ({languages}), "
            f"{figures['hours']:.2f} h, {figures['speakers']} speakers, "
            f"{figures['english_words']} words, {figures['han_characters']} characters"
        )
    print(f"{args.out}: ready in {time.monotonic() - start:.0f} s")
