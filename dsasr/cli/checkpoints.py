"""List and verify, average or compare checkpoints.

``list`` exits with 1 if a checkpoint is torn, ``compare`` if the two differ. How similar the
features of two encoders are (CKA), `dsasr probe` measures.

examples:
  dsasr checkpoints list runs/demo
  dsasr checkpoints average runs/demo/checkpoints/step-* --to runs/demo/average
  dsasr checkpoints compare runs/a/checkpoints/step-0000000100 runs/b/checkpoints/step-0000000100
  dsasr export runs/demo --checkpoint runs/demo/average --to models/demo
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path

from dsasr.cli.arguments import command_parser
from dsasr.utils.errors import UserError
from dsasr.utils.progress import Bar


def main(arguments: Sequence[str] | None = None) -> int:
    parser = command_parser(__name__, __doc__)
    parser.add_argument("action", choices=("list", "average", "compare"))
    parser.add_argument("folders", nargs="+", type=Path, help="list: runs; else checkpoints")
    parser.add_argument("--to", type=Path, help="average: the new folder")
    parser.add_argument("--most", type=int, default=20, help="compare: tensors shown")
    args = parser.parse_args(arguments)
    if args.action == "list":
        return 1 if list_checkpoints(args.folders) else 0
    if args.action == "compare":
        if len(args.folders) != 2:
            raise UserError("compare takes two checkpoints")
        return differences(*args.folders, args.most)
    if args.to is None:
        raise UserError("average needs --to FOLDER")

    from dsasr.checkpoint.locate import open_checkpoint
    from dsasr.checkpoint.merge import average, weight_keys

    readers = [open_checkpoint(path) for path in args.folders]
    with Bar(desc="averaging", unit="tensor", total=len(weight_keys(readers[0]))) as bar:
        average(readers, args.to, lambda _key: bar.update())
    print(f"{args.to}: the mean of {len(readers)} checkpoints")
    return 0


def list_checkpoints(runs: Sequence[Path]) -> int:
    """Print one line a checkpoint, verified; returns how many are not whole."""
    from dsasr.checkpoint import locate, tensor_fragments

    bad = 0
    for run in runs:
        folders = [run / "checkpoints", *sorted(run.glob("*/checkpoints")), run]
        folder = next((p for p in folders if locate.list_checkpoints(p)), None)
        if folder is None:
            raise UserError(f"{run} has no checkpoints")
        for path in locate.list_checkpoints(folder):
            size = sum(f.stat().st_size for f in path.iterdir()) / 1e6
            try:
                manifest = tensor_fragments.verify(path)
            except tensor_fragments.FragmentError as error:
                bad += 1
                print(f"{path.name}  {size:10.1f} MB  BAD: {error}")
                continue
            saved = manifest.get("saved")
            date = time.strftime("%F %T", time.localtime(saved)) if saved else "–"
            score = manifest.get("score")
            shown = "–" if score is None or math.isnan(score) else f"{score:.4f}"
            ranks = len(manifest["files"])
            print(f"{path.name}  {size:10.1f} MB  {ranks} ranks  {date}  score {shown}")
    return bad


def differences(a: Path, b: Path, most: int) -> int:
    """Print a table of what differs; returns 1 if anything does, as cmp does."""
    from dsasr.checkpoint.locate import open_checkpoint
    from dsasr.checkpoint.merge import compare, weight_keys

    first, second = open_checkpoint(a), open_checkpoint(b)
    total = len({*weight_keys(first), *weight_keys(second)})
    rows = list(Bar(compare(first, second), desc="comparing", unit="tensor", total=total))
    differing = [d for d in rows if d.differing]
    order = sorted(differing, key=lambda d: -math.inf if d.relative is None else -d.relative)
    for d in order[:most]:
        if d.relative is None:
            print(f"{d.key}: {d.why}")
        else:
            share = d.differing / d.elements
            print(f"{d.relative:9.2e} relative  {d.largest:9.2e} largest  {share:6.1%}  {d.key}")
    if len(order) > most:
        print(f"… and {len(order) - most} more (--most)")
    same = len(rows) - len(differing)
    print(f"{same} of {len(rows)} tensors are equal bit for bit")
    return 1 if differing else 0
