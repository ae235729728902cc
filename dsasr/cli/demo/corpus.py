"""Make the demo's bilingual speech corpus: grammar sentences spoken by synthetic voices.

python tools/synth_corpus.py --out corpus --hours 1.5
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from dsasr.demo.corpus import CorpusConfig, make_corpus
from dsasr.utils.errors import run_tool


def main() -> None:
    default = CorpusConfig()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to make it in")
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
    parser.add_argument("--fresh", action="store_true", help="make it even if it is there")
    args = parser.parse_args()
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


if __name__ == "__main__":
    sys.exit(run_tool(main))
