"""Score Whisper itself, its encoder with its own decoder, on shards: the figure beside a recipe's.

    python tools/whisper_own.py models/whisper-base corpus/en_read/shards/valid --lang en

Greedy, windows of 30 s, no timestamps; scored as `dsasr evaluate` scores.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence

import torch

from dsasr.evaluation.error_rate import score
from dsasr.evaluation.eval_sets import read_recordings
from dsasr.utils.errors import run_tool
from dsasr.utils.library_warnings import silence_library_warnings
from dsasr.utils.progress import Bar

RATE, BATCH = 16_000, 16


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a Hugging Face folder of Whisper, decoder included")
    parser.add_argument("data", nargs="+", help="shards")
    parser.add_argument("--lang", default="en", help="the language that it is told")
    parser.add_argument("--limit", type=int, default=0, help="utterances; 0: all")
    args = parser.parse_args(arguments)
    from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration, logging
    from transformers import WhisperTokenizerFast as Tokenizer

    silence_library_warnings()
    logging.set_verbosity_error()
    model = WhisperForConditionalGeneration.from_pretrained(args.model).eval()
    extractor = WhisperFeatureExtractor.from_pretrained(args.model)
    tokenizer = Tokenizer.from_pretrained(args.model)
    names = f"<|startoftranscript|><|{args.lang}|><|transcribe|><|notimestamps|>"
    prompt = torch.tensor([tokenizer(names, add_special_tokens=False)["input_ids"]])
    recordings, causes = read_recordings(args.data, rate=RATE, limit=args.limit)
    pairs = []
    for start in Bar(range(0, len(recordings), BATCH), desc="Whisper", delay=1):
        group = recordings[start : start + BATCH]
        waves = [recording.wave for recording in group]
        features = extractor(waves, sampling_rate=RATE, return_tensors="pt").input_features
        ids = model.generate(
            features, decoder_input_ids=prompt.expand(len(group), -1), max_new_tokens=128,
            do_sample=False, num_beams=1,
        )  # fmt: skip
        for recording, text in zip(
            group, tokenizer.batch_decode(ids, skip_special_tokens=True), strict=True
        ):
            pairs.append((recording.text, text.strip(), recording.lang))
    scores = score(pairs)
    print(f"{len(pairs)} utterances, left out {dict(causes)}")
    rates = {"WER": scores.wer, "CER": scores.cer, "characters": scores.character_rate}
    found = {name: rate for name, rate in rates.items() if not math.isnan(rate)}
    print(", ".join(f"{name} {100 * rate:.1f}%" for name, rate in found.items()))
    for reference, hypothesis, _ in pairs[:5]:
        print(f"  {reference}  →  {hypothesis}")
    return 0


if __name__ == "__main__":
    raise SystemExit(run_tool(main))
