"""Show a run in the terminal: stages, losses, drift, error rates, speed, drops, transcripts.

It reads the files of the run folder and nothing else, so the run may be finished, another
machine's, or one that ended badly. Without a terminal, and for a finished run, it prints one
frame. Ctrl-C ends it; the run goes on.

examples:
  dsasr watch runs/demo
  dsasr watch /shared/runs/nim --every 10
  dsasr watch runs/demo --once > frame.txt
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from dsasr.cli.arguments import command_parser
from dsasr.utils.errors import UserError
from dsasr.utils.terminal import beneath

if TYPE_CHECKING:
    from dsasr.reporting.run_state import Job


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command_parser(__name__, __doc__)
    parser.add_argument("run", type=Path, help="the run folder")
    parser.add_argument("--once", action="store_true", help="print one frame and end")
    parser.add_argument(
        "--every", type=float, default=2.0, metavar="SECONDS", help="between two frames (2)"
    )
    args = parser.parse_args(arguments)
    if not args.every > 0:
        raise UserError(f"--every {args.every:g}: give seconds above 0")

    from dsasr.reporting.run_state import Job, job_folders

    folders = job_folders(args.run)
    if not folders:
        what = "is no run folder" if args.run.is_dir() else "does not exist"
        raise UserError(f"{args.run} {what}: give the run=FOLDER of a recipe that has trained")
    jobs = [Job(folder, args.run) for folder in folders]
    if args.once or not sys.stdout.isatty() or _finished(jobs):
        _print(jobs)
    else:
        _follow(args.run, jobs, args.every)


def _follow(run: Path, jobs: list[Job], every: float) -> None:
    """Redraw until the run is finished or the user interrupts; the last frame stays."""
    from rich.live import Live

    from dsasr.reporting.run_state import Job, job_folders
    from dsasr.reporting.terminal_view import console_of, frame

    console = console_of(beneath(sys.stdout))
    try:
        with Live(console=console, screen=True, auto_refresh=False) as live:
            while not _finished(jobs):
                size = console.size
                ascii_only = console.options.ascii_only
                live.update(frame(jobs, size.width, size.height, ascii_only), refresh=True)
                time.sleep(every)
                for job in jobs:
                    job.refresh()
                known = {job.folder for job in jobs}
                with suppress(OSError):  # its file system is away: the jobs say so
                    # The second job of a concurrent run may begin later.
                    jobs += [Job(f, run) for f in job_folders(run) if f not in known]
    except KeyboardInterrupt:
        pass
    _print(jobs)


def _finished(jobs: Sequence[Job]) -> bool:
    return all(job.state.name == "finished" for job in jobs)


def _print(jobs: Sequence[Job]) -> None:
    from dsasr.reporting.terminal_view import frame, write

    write(lambda console: frame(jobs, console.width, ascii_only=console.options.ascii_only))
