"""List, verify, average or compare checkpoints.

python tools/checkpoints.py list runs/demo
python tools/checkpoints.py average runs/demo/checkpoints/step-* --to runs/demo/average
python tools/checkpoints.py compare runs/a/checkpoints/step-0000000100 runs/b/checkpoints/step-…
python tools/export.py runs/demo --checkpoint runs/demo/average --to models/demo

How alike two encoders are in what they compute (CKA) is tools/allocation.py's to say.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path

from dsasr.checkpoint import tensor_fragments
from dsasr.checkpoint.locate import list_checkpoints, open_checkpoint
from dsasr.checkpoint.merge import average, compare, weight_keys
from dsasr.checkpoint.tensor_fragments import FragmentError
from dsasr.utils.errors import UserError, run_tool
from dsasr.utils.progress import Bar


def listing(folders: list[Path]) -> int:
    """One line a checkpoint, verified; returns how many are not whole."""
    bad = 0
    for run in folders:
        inside = [run / "checkpoints", *sorted(run.glob("*/checkpoints")), run]
        place = next((p for p in inside if list_checkpoints(p)), None)
        if place is None:
            raise UserError(f"{run} has no checkpoints")
        for path in list_checkpoints(place):
            size = sum(f.stat().st_size for f in path.iterdir()) / 1e6
            try:
                held = tensor_fragments.verify(path)
            except FragmentError as error:
                bad += 1
                print(f"{path.name}  {size:10.1f} MB  BAD: {error}")
                continue
            saved = held.get("saved")
            when = time.strftime("%F %T", time.localtime(saved)) if saved else "–"
            score = held.get("score")
            shown = "–" if score is None or math.isnan(score) else f"{score:.4f}"
            ranks = len(held["files"])
            print(f"{path.name}  {size:10.1f} MB  {ranks} ranks  {when}  score {shown}")
    return bad


def differences(one: Path, other: Path, most: int) -> int:
    """A table of what differs; returns 1 if anything does, as cmp does."""
    a, b = open_checkpoint(one), open_checkpoint(other)
    total = len({*weight_keys(a), *weight_keys(b)})
    found = list(Bar(compare(a, b), desc="comparing", unit="tensor", total=total))
    differing = [d for d in found if d.differing]
    order = sorted(differing, key=lambda d: -math.inf if d.relative is None else -d.relative)
    for d in order[:most]:
        if d.relative is None:
            print(f"{d.key}: {d.why}")
        else:
            share = d.differing / d.elements
            print(f"{d.relative:9.2e} relative  {d.largest:9.2e} largest  {share:6.1%}  {d.key}")
    if len(order) > most:
        print(f"… and {len(order) - most} more (--most)")
    same = len(found) - len(differing)
    print(f"{same} of {len(found)} tensors are equal bit for bit")
    return 1 if differing else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=("list", "average", "compare"))
    parser.add_argument("folders", nargs="+", type=Path, help="list: runs; else checkpoints")
    parser.add_argument("--to", type=Path, help="average: the new folder")
    parser.add_argument("--most", type=int, default=20, help="compare: tensors shown")
    args = parser.parse_args()
    if args.action == "list":
        return 1 if listing(args.folders) else 0
    if args.action == "compare":
        if len(args.folders) != 2:
            raise UserError("compare takes two checkpoints")
        return differences(*args.folders, args.most)
    if args.to is None:
        raise UserError("average needs --to FOLDER")
    readers = [open_checkpoint(path) for path in args.folders]
    with Bar(desc="averaging", unit="tensor", total=len(weight_keys(readers[0]))) as bar:
        average(readers, args.to, lambda _key: bar.update())
    print(f"{args.to}: the mean of {len(readers)} checkpoints")
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(main))
