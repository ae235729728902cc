"""Measure the first hour: from a corpus to trained steps and a first evaluation, by two commands.

    python tools/first_hour.py SPEECH CHINESE --llm DIR --encoder DIR [--layouts nemo kaldi …]

SPEECH: a folder with train.jsonl and valid.jsonl of English recordings; CHINESE: one of Mandarin,
for the AISHELL-1 tree, whose transcripts have no spaces. Of these, trees in the layouts of
`LAYOUTS` are made below --work. For each, `dsasr init` and the training command that it prints
first (a few steps of everything and an evaluation) are run as a new user would; a command that
fails is a dead end. Rows go to tools/first_hour.jsonl. The machine should do nothing else.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import soundfile

from dsasr.utils.environment import environment
from dsasr.utils.errors import run_tool
from dsasr.utils.io import read_json_lines

RESULTS = Path(__file__).with_name("first_hour.jsonl")
BAR = 5.0  # minutes
Rows = dict[str, list[dict[str, Any]]]  # split → rows of its manifest, audio as an absolute path


def rows_of(folder: Path) -> Rows:
    found: Rows = {}
    for split in ("train", "valid"):
        rows = read_json_lines(folder / f"{split}.jsonl")
        found[split] = [row | {"audio": str((folder / row["audio"]).resolve())} for row in rows]
    return found


def convert(source: str, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    wave, rate = soundfile.read(source, dtype="int16")
    soundfile.write(target, wave, rate)


def own(rows: Rows, folder: Path) -> Path:
    """This project's JSONL, with audio where it is."""
    folder.mkdir(parents=True)
    for split, lines in rows.items():
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / f"{split}.jsonl").write_text(text)
    return folder


def librispeech(rows: Rows, folder: Path) -> Path:
    for split, name in (("train", "train-clean-100"), ("valid", "dev-clean")):
        texts: dict[Path, list[str]] = {}
        for number, row in enumerate(rows[split]):
            speaker = int("".join(filter(str.isdigit, row["speaker"])))
            key = f"{speaker}-1-{number:04d}"
            chapter = folder / name / str(speaker) / "1"
            convert(row["audio"], chapter / f"{key}.flac")
            texts.setdefault(chapter / f"{speaker}-1.trans.txt", []).append(
                f"{key} {row['text']}\n"
            )
        for path, lines in texts.items():
            path.write_text("".join(lines))
    return folder


def aishell(rows: Rows, folder: Path) -> Path:
    lines = []
    for split, name in (("train", "train"), ("valid", "dev")):
        for number, row in enumerate(rows[split]):
            speaker = "S0002" if split == "train" else "S0724"
            key = f"BAC009{speaker}W{number:04d}"
            convert(row["audio"], folder / "wav" / name / speaker / f"{key}.wav")
            lines.append(f"{key} {row['text']}\n")
    (folder / "transcript").mkdir()
    (folder / "transcript" / "aishell_transcript_v0.8.txt").write_text("".join(lines))
    return folder


def nemo(rows: Rows, folder: Path) -> Path:
    folder.mkdir(parents=True)
    for split, name in (("train", "train_manifest"), ("valid", "dev_manifest")):
        with open(folder / f"{name}.json", "w") as file:
            for row in rows[split]:
                values = {"audio_filepath": row["audio"], "text": row["text"],
                          "duration": row["duration"], "speaker": row["speaker"]}  # fmt: skip
                file.write(json.dumps(values) + "\n")
    return folder


def audiofolder(rows: Rows, folder: Path) -> Path:
    """One folder without splits: validation and test are made."""
    lines = [["file_name", "transcription", "speaker_id"]]
    for number, row in enumerate(rows["train"]):
        convert(row["audio"], folder / "data" / f"{number:05d}.wav")
        lines.append([f"data/{number:05d}.wav", row["text"], row["speaker"]])
    with open(folder / "metadata.csv", "w", newline="") as file:
        csv.writer(file).writerows(lines)
    return folder


def common_voice(rows: Rows, folder: Path) -> Path:
    (folder / "clips").mkdir(parents=True)
    for split, name in (("train", "train"), ("valid", "dev")):
        with open(folder / f"{name}.tsv", "w") as file:
            file.write("client_id\tpath\tsentence\tlocale\n")
            for number, row in enumerate(rows[split]):
                clip = f"common_voice_en_{name}{number}.mp3"
                convert(row["audio"], folder / "clips" / clip)
                file.write(f"{row['speaker']}\t{clip}\t{row['text'].capitalize()}.\ten\n")
    return folder


LAYOUTS: dict[str, Callable[[Rows, Path], Path]] = {
    "jsonl": own, "librispeech": librispeech, "aishell": aishell, "nemo": nemo,
    "audiofolder": audiofolder, "common-voice": common_voice,
}  # fmt: skip


def run(command: Sequence[str], place: Path, log: Path) -> tuple[int, float, str]:
    """(exit code, seconds, output) of a command, whose output goes to ``log``, too."""
    started = time.monotonic()
    done = subprocess.run(
        command, cwd=place, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
    )
    log.write_text(done.stdout)
    return done.returncode, time.monotonic() - started, done.stdout


def printed(output: str) -> list[list[str]]:
    """The commands among the lines that `dsasr init` prints."""
    return [shlex.split(line) for line in output.splitlines() if line.startswith("dsasr ")]


def measure(layout: str, tree: Path, args: argparse.Namespace) -> dict[str, Any]:
    """The row of one layout."""
    place = args.work / f"{layout}-run"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    program = [sys.executable, "-m", "dsasr.cli"]
    models = ["--llm", str(args.llm.resolve()), "--encoder", str(args.encoder.resolve())]
    words = ["init", str(tree), *models]
    code, first, output = run([*program, *words], place, place / "init.log")
    row: dict[str, Any] = {"layout": layout, "init_seconds": round(first, 1)}
    dead_ends = [] if code == 0 else [output.strip().splitlines()[-1]]
    commands = printed(output)
    named = ["init", tree.name, "--llm", args.llm.name, "--encoder", args.encoder.name]
    row["commands"] = ["dsasr " + shlex.join(named)]
    if commands:
        words = commands[0][1:]
        row["commands"].append("dsasr " + shlex.join(words))
        code, second, output = run([*program, *words], place, place / "train.log")
        row["train_seconds"] = round(second, 1)
        if code:
            dead_ends.append(output.strip().splitlines()[-1])
        row |= results(place / "runs" / "mine-try")
        row["minutes"] = round((first + second) / 60, 2)
    row["dead_ends"] = dead_ends
    done = code == 0 and row.get("evaluated")
    row["passed"] = bool(done and row["minutes"] <= BAR and not dead_ends)
    return row


def results(folder: Path) -> dict[str, Any]:
    """Trained steps and the scores of the last evaluation of a run."""
    steps = {
        event["name"]: event["steps"]
        for event in read_json_lines(folder / "events.jsonl")
        if event.get("event") == "stage_end"
    }
    scored = [m for m in read_json_lines(folder / "metrics.jsonl") if "wer" in m or "cer" in m]
    scores = {k: v for k, v in (scored[-1] if scored else {}).items() if k in ("wer", "cer")}
    return {"steps": sum(steps.values()), "evaluated": bool(scored), **scores}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("speech", type=Path, help="folder of English, with train and valid.jsonl")
    parser.add_argument("chinese", type=Path, help="folder of Mandarin, likewise")
    parser.add_argument("--llm", type=Path, required=True)
    parser.add_argument("--encoder", type=Path, required=True)
    parser.add_argument("--layouts", nargs="*", choices=list(LAYOUTS), default=list(LAYOUTS))
    parser.add_argument("--work", type=Path, default=Path("corpus/first-hour"))
    args = parser.parse_args(arguments)
    args.work = args.work.resolve()
    os.environ["PYTHONPATH"] = str(Path(__file__).parents[1])
    machine = environment()
    for layout in args.layouts:
        tree = args.work / layout
        if not tree.exists():
            source = args.chinese if layout == "aishell" else args.speech
            part = tree.with_name(f".{layout}.tmp")
            shutil.rmtree(part, ignore_errors=True)
            LAYOUTS[layout](rows_of(source), part).rename(tree)
        row = measure(layout, tree, args)
        with open(RESULTS, "a", encoding="utf-8") as file:
            file.write(json.dumps(row | {"machine": machine}, ensure_ascii=False) + "\n")
        minutes, steps = row.get("minutes", "-"), row.get("steps", 0)
        counts = f"{len(row['commands'])} commands  {len(row['dead_ends'])} dead ends"
        print(f"{layout:<14} {minutes:>6} min  {counts}  {steps} steps", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(run_tool(main))
