"""Memory and time of the commands that read a whole corpus, by its number of utterances.

    python tools/bench/corpus_memory.py --llm DIR --encoder DIR [--utterances 10000 1000000]

A corpus of that many rows and files is made below --work: tones of half a second to two seconds
(hard links of a thousand files), each with a sentence of its own, by one speaker for a hundred. Run
are `dsasr init --dry-run`, which reads every row, and up to --packed utterances `dsasr data
make-shards` and `dsasr data inspect`. Recorded: seconds, and the peak resident set of the largest
process of a command, in MB.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import soundfile

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from common import record

from dsasr.utils.errors import UserError, run_tool
from dsasr.utils.progress import Bar

FILES = 1000
WORDS = [a + b for a in ("ba", "de", "fi", "go", "lu", "ma", "ne") for b in ("n", "r", "st", "lo")]
DSASR = (sys.executable, "-m", "dsasr.cli")
# A process' peak counts what its parent had when it started it: here a small one.
_OF_CHILDREN = """
import resource, subprocess, sys
code = subprocess.run(sys.argv[1:]).returncode
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, flush=True)
sys.exit(code)
"""


def make_corpus(folder: Path, utterances: int) -> Path:
    """`folder`/train.jsonl of so many rows, each with a file of its own."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "tones").mkdir(parents=True)
    draw = random.Random(utterances)
    lengths = []
    for number in range(FILES):
        seconds = draw.uniform(0.5, 2.0)
        times = np.arange(int(8000 * seconds)) / 8000
        wave = 0.1 * np.sin(2 * np.pi * (200 + number) * times)
        soundfile.write(folder / "tones" / f"{number}.wav", wave, 8000)
        lengths.append(seconds)
    with open(folder / "train.jsonl", "w", encoding="utf-8") as file:
        for i in Bar(range(utterances), desc=f"{utterances:,} utterances", delay=3):
            audio = folder / "audio" / f"{i // FILES:04d}" / f"{i:07d}.wav"
            if i % FILES == 0:
                audio.parent.mkdir(parents=True)
            os.link(folder / "tones" / f"{i % FILES}.wav", audio)
            row = {
                "id": f"u{i:07d}", "audio": str(audio), "text": " ".join(draw.choices(WORDS, k=5)),
                "speaker": f"s{i // 100}", "duration": lengths[i % FILES],
            }  # fmt: skip
            file.write(json.dumps(row) + "\n")
    return folder


def measure(name: str, utterances: int, *arguments: str | Path) -> None:
    command = [*DSASR, *map(str, arguments)]
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", _OF_CHILDREN, *command],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    if done.returncode:
        raise UserError(f"{' '.join(command)} failed:\n{done.stdout[-1000:]}")
    seconds = round(time.monotonic() - began, 1)
    peak = round(int(done.stdout.split()[-1]) / 1024)
    record("corpus_memory", command=name, utterances=utterances, seconds=seconds, peak_mb=peak)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--llm", type=Path, required=True)
    parser.add_argument("--encoder", type=Path, required=True)
    parser.add_argument("--utterances", type=int, nargs="+", default=[10_000, 1_000_000])
    parser.add_argument("--packed", type=int, default=100_000, help="packed and inspected up to")
    parser.add_argument("--work", type=Path, default=Path("corpus/memory"))
    args = parser.parse_args()
    for count in args.utterances:
        corpus = make_corpus(args.work.resolve() / str(count), count)
        models = ("--llm", args.llm, "--encoder", args.encoder, "--out", args.work / "mine")
        measure("init --dry-run", count, "init", corpus, *models, "--dry-run", "--lang", "en")
        if count <= args.packed:
            shards, page = corpus / "shards", corpus / "page.html"
            measure(
                "make-shards", count, "data", "make-shards", corpus / "train.jsonl",
                "--out", shards,
            )  # fmt: skip
            measure("inspect", count, "data", "inspect", shards, "--shards", "0", "--out", page)
        shutil.rmtree(corpus)


if __name__ == "__main__":
    sys.exit(run_tool(main))
