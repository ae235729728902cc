"""Have a running job save a checkpoint before its next step, and end.

It works wherever the job runs: by a file in the run folder. A Slurm job that is stopped so is not
requeued. RUN/pretrain or RUN/sft stops one of the two jobs of a concurrent run, RUN both.

examples:
  dsasr stop runs/mine
  dsasr stop runs/mine --wait        returns when the job has ended
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from dsasr.cli.arguments import command_parser
from dsasr.launch import run_lock, slurm
from dsasr.utils.errors import UserError

POLL = 1.0  # seconds


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command_parser(__name__, __doc__)
    parser.add_argument("run", type=Path, help="the run folder")
    parser.add_argument("--wait", action="store_true", help="return when the job has ended")
    args = parser.parse_args(arguments)
    if not args.run.is_dir():
        raise UserError(f"there is no run folder {args.run}")
    folders = [args.run, args.run / "pretrain", args.run / "sft"]
    stopping = {folder: owner for folder in folders if (owner := run_lock.ask_to_stop(folder))}
    for folder, owner in stopping.items():
        print(f"{folder}: {owner} saves and stops before its next step", flush=True)
    job = slurm.job_of(args.run)
    if job:
        slurm.ask_to_stop(args.run, job)
        if not stopping:
            print(
                f"{args.run}: Slurm job {job} does not train just now; it will not start again "
                f"(`scancel {job}` ends it now)"
            )
    elif not stopping:
        raise UserError(f"nothing trains in {args.run}")
    while args.wait and any(run_lock.Owner.read(f) == o for f, o in stopping.items()):
        if all(owner.lives is False for owner in stopping.values()):
            break
        time.sleep(POLL)
