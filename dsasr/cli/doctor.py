"""Examine a job's machines before it starts: whether what it needs is there, and fast enough.

Versions and code equal on all ranks, GPUs and their memory errors, products, clocks, all-reduce
beside the link; with a recipe also the run folder, the rate of reading shards and of writing
checkpoints beside what `dsasr plan cluster` needs, and free space. It takes some seconds. What
falls short has a line that says what to do, and the exit code is then 1. Jobs under Slurm do it at
each start (slurm.doctor).

examples:
  dsasr doctor
  dsasr doctor --recipe nim-2.3b run=/shared/nim
  dsasr doctor --recipe nim-2.3b --hostfile hosts
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import dsasr
from dsasr.cli.arguments import add_machines, add_recipe, command_parser

PROGRAM = Path(dsasr.__file__).parent / "doctor" / "rank.py"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = command_parser(__name__, __doc__)
    add_recipe(parser, required=False)
    add_machines(parser)
    args = parser.parse_intermixed_args(arguments)
    words = [*(["--recipe", args.recipe] if args.recipe else []), *args.overrides]

    from dsasr.doctor import rank
    from dsasr.launch import deepspeed_launcher

    ranks = args.ranks or (0 if args.hostfile else deepspeed_launcher.gpus() or 1)
    if ranks == 1:
        return rank.main(words)
    return deepspeed_launcher.run(
        PROGRAM, words, ranks=ranks, hostfile=args.hostfile, explained=(rank.SHORT, rank.LATE)
    )
