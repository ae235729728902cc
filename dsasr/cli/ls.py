"""List the runs below a folder: state, stage, steps, error rate, hours trained, last change.

"trained" is the time of training without pauses, "hours of audio" the audio trained on in that
time. A folder that cannot be read, or is damaged, is named below the table.

examples:
  dsasr ls runs
  dsasr ls runs --state running,failed
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dsasr.cli.arguments import command_parser
from dsasr.utils.errors import UserError

WIDTH = 200  # columns where there is no terminal


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command_parser(__name__, __doc__)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("runs"), help="default: runs")
    parser.add_argument("--state", default="", help="only those, such as running,failed")
    args = parser.parse_args(arguments)

    from dsasr.config import nearest
    from dsasr.reporting import runs_table
    from dsasr.reporting.terminal_view import COLORS, write

    states = [word for word in args.state.split(",") if word]
    for state in states:
        if state not in COLORS:
            raise UserError(f"--state {state}: no such state{nearest(state, list(COLORS))}")
    if not args.folder.is_dir():
        raise UserError(f"there is no folder {args.folder}: give the one that holds your runs")
    found = runs_table.find(args.folder)
    jobs = [job for job in found.jobs if not states or job.state.name in states]
    if not found.jobs and not found.problems:
        raise UserError(f"{args.folder} holds no run: a run is the folder of run=FOLDER")
    if jobs:
        write(lambda console: runs_table.table(jobs, args.folder), WIDTH)
    else:
        print(f"no run in {args.folder}{' is ' + args.state if states and found.jobs else ''}")
    for problem in found.problems:
        print(f"bad: {' '.join(problem.split())}")
