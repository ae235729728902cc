"""Fuzz the dataloader: random shards, ranks, workers, kills and changes of the world size.

    python tools/fuzz_dataloader.py --cases 200

Every case compares each batch, bit by bit, with an uninterrupted run, and each finished epoch with
the plain list of keys. Prints one JSON line of counts; the exit code is 1 if any fault is not zero.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path

import torch

from dsasr.testing.dataloader_fuzz import FuzzReport, draw_case, run_case
from dsasr.utils.errors import run_tool
from dsasr.utils.progress import Bar


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--cases", type=int, default=200, help="number of random cases (default: 200)"
    )
    parser.add_argument("--seed", type=int, default=0, help="number of the first case")
    args = parser.parse_args()
    torch.set_num_threads(1)
    report, started = FuzzReport(), time.perf_counter()
    folder = Path(tempfile.mkdtemp(prefix="dsasr-fuzz-"))
    try:
        for seed in Bar(range(args.seed, args.seed + args.cases), unit="case"):
            run_case(draw_case(seed), folder / str(seed), report)
            shutil.rmtree(folder / str(seed))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    line = {**dataclasses.asdict(report), "seconds": round(time.perf_counter() - started, 1)}
    print(json.dumps(line))
    return 0 if report.clean else 1


if __name__ == "__main__":
    sys.exit(run_tool(main))
