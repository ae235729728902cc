"""Kill a run again and again, and compare its end with that of an undisturbed one, bit for bit.

python tools/soak.py --recipe mine.yaml --out soak --kills 30 --ranks 2
python tools/soak.py --recipe mine.yaml --out soak-pair --kills 30 --concurrent
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from tqdm import tqdm

from dsasr import recipe
from dsasr.errors import UserError, run_tool
from dsasr.soak import soak


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", required=True, help="a short one: it is trained all over again")
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
    recipe.load(args.recipe, args.overrides)
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # where bits can be expected to repeat
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tqdm(total=args.kills, unit="kill") as bar:

        def tell(line: str) -> None:
            bar.update(line.startswith("kill "))
            tqdm.write(line)

        verdict = soak(
            args.recipe, args.overrides, args.out, kills=args.kills, world=args.ranks,
            seed=args.seed, concurrent=args.concurrent, patience=args.patience, tell=tell,
        )  # fmt: skip
    for (moment, target), count in sorted(verdict.kills.items()):
        print(f"{count:>4} × {target} at {moment}")
    for fault in verdict.faults:
        print(f"fault: {fault}")
    kills, end = sum(verdict.kills.values()), "the end is bit for bit that of the undisturbed run"
    if verdict.faults:
        end = f"{len(verdict.faults)} faults"
    print(f"{kills} kills, {verdict.starts} starts: {end}")
    return 1 if verdict.faults else 0


if __name__ == "__main__":
    sys.exit(run_tool(main))
