"""Manifests and language-model text of the recorded sets, for tools/reproduce.sh.

python tools/experiments/recorded.py digits ../shared/data/en_digits corpus/experiment/digits
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path

from dsasr.utils.errors import UserError, run_tool
from dsasr.utils.io import atomic_write

DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


def rows(path: Path, folder: Path) -> list[dict]:
    """The manifest's rows with absolute paths of their audio."""
    if not path.is_file():
        raise UserError(f"{path} is missing")
    entries = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    # The read sentences are in capitals, which carry no information and are in no lexicon.
    return [
        row | {"audio": str((folder / row["audio"]).resolve()), "text": row["text"].lower()}
        for row in entries
    ]


def write(path: Path, entries: list[dict]) -> None:
    atomic_write(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in entries))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=("digits", "read"))
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    train = rows(args.data / "train.jsonl", args.data)
    name = "test" if args.kind == "digits" else "valid"
    test = rows(args.data / f"{name}.jsonl", args.data)
    args.out.mkdir(parents=True, exist_ok=True)
    # Validation during training uses a part of the training set: the test set stays unseen.
    write(args.out / "train.jsonl", [row for i, row in enumerate(train) if i % 20])
    write(args.out / "valid.jsonl", train[::20])
    write(args.out / "test.jsonl", test)
    if args.kind == "digits":
        rng = random.Random(0)
        sentences = [" ".join(rng.choices(DIGITS, k=rng.randint(2, 9))) for _ in range(20_000)]
    else:
        sentences = [row["text"] for row in train]
    atomic_write(args.out / "text.txt", "\n".join(sentences) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(main))
