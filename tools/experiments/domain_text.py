"""Domain adaptation by text alone, on the demo's English: who has text of a domain, but no speech.

Sentences about food are taken out of the demo's speech and out of all text, so that encoder,
tokenizer and language model know none of their words. Three ways of SFT with equally many steps of
speech are then compared on such sentences, and on the others:

    speech        no text-only batches
    other-text    half of the micro-batches are text of the other sentences: a control
    domain-text   half of the micro-batches are text about food

python tools/experiments/domain_text.py --work runs/domain

A row for each seed and way goes to tools/experiments/results/domain.jsonl; what is there is not
run again. Encoder and language model are shared by all.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).parent))
from reproduce import RESULTS, run_dsasr

from dsasr.data.text.ctc_noise import Confusions
from dsasr.data.text.phoneme_vocab import PhonemeVocab
from dsasr.demo.vocabulary import ENGLISH_SLOTS
from dsasr.evaluation.error_rate import score
from dsasr.evaluation.results import read_results
from dsasr.tracking.run_log import is_finished
from dsasr.utils.errors import run_tool
from dsasr.utils.io import atomic_write, read_lines

FOOD = frozenset(ENGLISH_SLOTS["food"])
WAYS = {"speech": "", "other-text": "other", "domain-text": "domain"}
SETS = ("other", "domain")


def in_domain(text: str) -> bool:
    return bool(FOOD & set(text.split()))


def make_data(work: Path, hours: float) -> None:
    """Corpus, shards, vocabularies and language model; training files lack the domain."""
    corpus, text, shards = work / "corpus", work / "text", work / "shards"
    run_dsasr(
        "demo", "corpus", "--out", corpus, "--hours", hours, "--english-share", 1,
        "--test", 600, "--text", 20_000, "--nonspeech", 3, "--processes", 1,
    )  # fmt: skip
    for split in ("train", "valid", "test"):
        rows = [json.loads(line) for line in read_lines(corpus / f"{split}.jsonl")]
        for row in rows:
            row["audio"] = str((corpus / row["audio"]).resolve())
        _split(rows, work / "manifests", split, ".jsonl", lambda row: row["text"], json.dumps)
    for name in ("lm", "lm_heldout"):
        lines = read_lines(corpus / "text" / f"{name}.txt")
        _split(lines, text, name, ".txt", str, str)
    files = [work / "manifests" / f"{name}-other.jsonl" for name in ("train", "valid", "test")]
    files.append(work / "manifests" / "test-domain.jsonl")
    run_dsasr("data", "make-shards", *files, "--out-root", shards, "--shard-size", 250)
    train = shards / "train-other"
    if not (work / "cmvn.json").is_file():
        run_dsasr("data", "cmvn", train, "--out", work / "cmvn.json")
    if not (work / "phonemes.json").is_file():
        run_dsasr("data", "phonemes", train, "--out", work / "phonemes.json")
    run_dsasr("data", "tokenizer", text / "lm-other.txt", "--out", work / "tokenizer")
    run_dsasr(
        "demo", "lm", text / "lm-other.txt", "--heldout", text / "lm_heldout-other.txt",
        "--tokenizer", work / "tokenizer", "--out", work / "lm", "--reads", "espeak",
        "--steps", 400,
    )  # fmt: skip


def _split(items: Iterable, folder: Path, name: str, suffix: str, text, written) -> None:
    """Write ``items`` to two files, by whether their text is in the domain."""
    parts: dict[str, list[str]] = {kind: [] for kind in SETS}
    for item in items:
        parts[SETS[in_domain(text(item))]].append(written(item) + "\n")
    for kind, lines in parts.items():
        atomic_write(folder / f"{name}-{kind}{suffix}", "".join(lines))


def train(work: Path, run: Path, branch: str, values: dict[str, Any]) -> Path:
    """Train the demo's recipe with ``values`` to its end; returns the run's folder."""
    shards = work / "shards"
    data = {
        "train": [{"name": "demo", "shards": str(shards / "train-other")}],
        "valid": [{"name": "valid", "shards": str(shards / "valid-other")}],
        "cmvn": str(work / "cmvn.json"),
        "phonemes": str(work / "phonemes.json"),
        "phonemizer": {"kind": "espeak"},
        "dataloader": {"batch": {"frames": 2000, "max_seconds": 12}},
    }
    model = {
        "tokenizer": str(work / "lm"),
        "llm": {"path": str(work / "lm")},
        "adaptor": {"kind": "ctc", "stack": 4, "hidden": 0},
    }
    values = {
        "base": "demo", "run": str(run), "branch": branch, "drift": {"mode": "final"},
        "evaluation": {"every": 0, "utterances": 32}, "probe": {"every": 0},
        **values, "data": data | values.get("data", {}), "model": model | values.get("model", {}),
    }  # fmt: skip
    folder = run / branch
    if not is_finished(folder):
        recipe = run.with_suffix(".yaml")
        atomic_write(recipe, yaml.safe_dump(values, sort_keys=False))
        run_dsasr("train", "--recipe", recipe, "--ranks", 1)
    return folder


def pretrain(work: Path, steps: int) -> Path:
    """The encoder and its CTC head, shared by all ways, and the head's confusions."""
    stage = {"name": "pretrain", "branch": "pretrain", "objective": "ctc", "steps": steps}
    stage |= {"trains": {"encoder": 1.0e-3, "ctc": 1.0e-3}, "warmup_steps": 30}
    stage |= {"batch": {"frames": 3000, "max_seconds": 12}}
    run = train(work, work / "runs" / "encoder", "pretrain", {"seed": 1, "stages": [stage]})
    for name in ("valid-other", "test-other", "test-domain"):
        out = work / f"confusions-{name}.json"
        if not out.is_file():
            shards = work / "shards" / name
            run_dsasr("data", "confusions", run, "--data", shards, "--out", out)
    return run


def sft(work: Path, encoder: Path, way: str, seed: int, steps: int) -> Path:
    """Align on speech, then train adaptor and language model; ``steps`` of it have speech."""
    text = WAYS[way]
    common = {"branch": "sft", "warmup_steps": 10}
    align = {"name": "align", "trains": {"adaptor": 1.0e-3}, "steps": 40, **common}
    tune = {"name": "tune", "trains": {"adaptor": 1.0e-3, "llm": 1.0e-3}, "steps": steps, **common}
    if text:
        tune |= {"text_share": 0.5, "steps": 2 * steps}
    text_only = {
        "path": str(work / "text" / f"lm-{text}.txt"), "lang": "en", "samples": 16,
        "confusions": str(work / "confusions-valid-other.json"),
    }  # fmt: skip
    return train(
        work, work / "runs" / f"{way}-seed{seed}", "sft",
        {
            "seed": seed,
            "stages": [align, tune],
            "data": {"text_only": text_only} if text else {},
            "model": {"init_from": str(encoder), "init_parts": ["encoder", "head"]},
        },
    )  # fmt: skip


def measure(work: Path, run: Path) -> dict[str, Any]:
    """WER on both kinds of test sentences, and of the domain's words how many are written."""
    out = run / "test.jsonl"
    if not out.is_file():
        data = [work / "shards" / f"test-{kind}" for kind in SETS]
        run_dsasr("evaluate", run, "--data", *data, "--out", out)
    rows = read_results(out).rows
    found: dict[str, Any] = {}
    for kind in SETS:
        of_kind = [r for r in rows if SETS[in_domain(r.reference)] == kind]
        scores = score((r.reference, r.hypothesis, r.lang, r.key) for r in of_kind)
        found[kind] = {"utterances": len(of_kind), "wer": round(scores.wer, 4)}
    words = [(w, r.hypothesis.split()) for r in rows for w in FOOD & set(r.reference.split())]
    found["food_words"] = len(words)
    found["food_words_written"] = round(sum(w in said for w, said in words) / len(words), 4)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for corpus and runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--hours", type=float, default=1.8, help="of speech, the domain's included")
    parser.add_argument("--pretrain-steps", type=int, default=700)
    parser.add_argument("--sft-steps", type=int, default=250, help="with speech")
    parser.add_argument("--out", type=Path, default=RESULTS / "domain.jsonl")
    args = parser.parse_args()
    args.work = args.work.resolve()
    make_data(args.work, args.hours)
    encoder = pretrain(args.work, args.pretrain_steps)
    units = PhonemeVocab.load(args.work / "phonemes.json").symbols
    errors = {
        kind: sum(Confusions.load(args.work / f"confusions-test-{kind}.json", units).rates.values())
        for kind in SETS
    }
    rows = [json.loads(line) for line in read_lines(args.out)] if args.out.is_file() else []
    for seed in args.seeds:
        for way in WAYS:
            if any((row["seed"], row["way"]) == (seed, way) for row in rows):
                continue
            run = sft(args.work, encoder, way, seed, args.sft_steps)
            row = {"seed": seed, "way": way, "when": time.strftime("%Y-%m-%d")}
            row |= {"pretrain_steps": args.pretrain_steps, "sft_steps": args.sft_steps}
            row |= {"phoneme_errors": {k: round(v, 4) for k, v in errors.items()}}
            rows.append(row | measure(args.work, run))
            atomic_write(args.out, "".join(json.dumps(row) + "\n" for row in rows))
            print(json.dumps(rows[-1]), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(main))
