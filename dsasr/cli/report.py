"""Write one HTML page of one or more runs, with its figures as PNGs; it needs no network.

example:
  dsasr report runs/demo --out report
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dsasr.cli.arguments import command_parser


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command_parser(__name__, __doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders")
    parser.add_argument("--out", type=Path, help="folder (default: report in the first run's)")
    parser.add_argument(
        "--no-tensorboard", action="store_true", help="leave the runs' TensorBoard as it is"
    )
    args = parser.parse_args(arguments)

    from dsasr.reporting import html_report, run_data
    from dsasr.tracking.tensorboard import add_images

    out = args.out or args.runs[0] / "report"
    runs = run_data.named(args.runs)
    page = html_report.write(runs, out)
    if not args.no_tensorboard:
        for folder, run in zip(args.runs, runs, strict=True):
            steps = max((m["steps"] for m in run.metrics), default=0)
            for job in (folder, *(folder / name for name in run.jobs)):
                if (job / "tensorboard").is_dir():
                    add_images(job / "tensorboard", sorted(out.glob("*.png")), steps)
    print(f"{page}  ({len(list(out.glob('*.png')))} pictures beside it)")
