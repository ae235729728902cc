"""Train a recipe on this machine, one rank a GPU, or on several machines with --hostfile.

A run resumes from its newest checkpoint. Ctrl-C, SIGTERM, SIGUSR1 and `dsasr stop RUN` have it save
before its next step, and stop. DeepSpeed's own log lines are left out: `deepspeed dsasr/train.py`
with the same arguments shows them, but its launcher kills ranks that take over 30 s to save.

examples:
  dsasr train --recipe demo run=runs/mine stages.ia_sft.steps=1000
  dsasr train --recipe demo --ranks 2            on a machine without a GPU: two CPU ranks
  dsasr train --recipe mine.yaml --hostfile hosts
  dsasr train --recipe mine.yaml --check
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import dsasr
from dsasr.cli.arguments import add_machines, add_recipe, command_parser

PROGRAM = Path(dsasr.__file__).with_name("train.py")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = command_parser(__name__, __doc__)
    add_recipe(parser)
    add_machines(parser)
    parser.add_argument(
        "--check",
        action="store_true",
        help="print on one screen what the run will read, learn and take, and stop",
    )
    args = parser.parse_intermixed_args(arguments)
    recipe = ["--recipe", args.recipe, *args.overrides]
    if args.check:
        from dsasr import train

        return train.main([*recipe, "--check"])

    from dsasr.launch import deepspeed_launcher

    return deepspeed_launcher.run(PROGRAM, recipe, ranks=args.ranks, hostfile=args.hostfile)
