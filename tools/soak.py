"""Kill a run again and again, and compare it with one that is never killed, bit for bit.

python tools/soak.py --recipe mine.yaml --out soak --kills 30 --ranks 2
python tools/soak.py --recipe mine.yaml --out soak-pair --kills 30 --concurrent

Prints each kill (job, target, phase) and one JSON line; the exit code is 1 if anything differs.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from dsasr.testing.soak import soak
from dsasr.utils.errors import UserError, run_tool
from dsasr.utils.progress import Bar


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", required=True, help="a short one: it is trained several times")
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--concurrent", action="store_true", help="two jobs, one for each branch")
    parser.add_argument("--patience", type=float, default=900.0, help="seconds until it is a hang")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="recipe overrides")
    args = parser.parse_intermixed_args()
    if min(args.kills, args.ranks) < 1:
        raise UserError("--kills and --ranks must be at least 1")
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # where bits can be expected to repeat
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with Bar(total=args.kills, unit="kill") as bar:

        def report(line: str) -> None:
            bar.update(line.startswith("kill "))
            Bar.write(line)

        result = soak(
            args.recipe, args.overrides, args.out, kills=args.kills, world=args.ranks,
            seed=args.seed, concurrent=args.concurrent, patience=args.patience, report=report,
        )  # fmt: skip
    for fault in result.faults:
        print(f"fault: {fault}")
    line = {
        "mode": "concurrent" if args.concurrent else "colocated",
        "ranks": args.ranks,
        "kills": sum(result.kills.values()),
        **result.summary(),
    }
    print(json.dumps(line))
    return 1 if result.faults else 0


if __name__ == "__main__":
    sys.exit(run_tool(main))
