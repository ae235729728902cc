"""One HTML page of one or more runs, with its pictures as PNGs; needs no network.

python tools/report.py runs/demo --out report
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from dsasr.reporting import html_report, run_data
from dsasr.tracking.monitor import add_images
from dsasr.utils.errors import run_tool


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, help="run folders")
    parser.add_argument("--out", type=Path, help="folder (default: report in the first run's)")
    parser.add_argument(
        "--no-tensorboard", action="store_true", help="leave the runs' TensorBoard as it is"
    )
    args = parser.parse_args()
    out = args.out or args.runs[0] / "report"
    runs = run_data.named(args.runs)
    page = html_report.write(runs, out)
    if not args.no_tensorboard:
        for folder, run in zip(args.runs, runs, strict=True):
            steps = max((m["steps"] for m in run.metrics), default=0)
            for place in (folder, *(folder / job for job in run.jobs)):
                if (place / "tensorboard").is_dir():
                    add_images(place / "tensorboard", sorted(out.glob("*.png")), steps)
    print(f"{page}  ({len(list(out.glob('*.png')))} pictures beside it)")
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(main))
