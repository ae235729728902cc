"""Print the overrides that make a colocated run repeat the encoder swaps of another run.

With them `dsasr train` repeats a concurrent run bit for bit, although its swaps depended on the
speed of its two jobs. They are quoted for a shell, to be pasted.

example:
  dsasr replay runs/mine/sft
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from dsasr.cli.arguments import command_parser


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command_parser(__name__, __doc__)
    parser.add_argument("run", type=Path, help="the run folder (of a concurrent run: RUN/sft)")
    args = parser.parse_args(arguments)

    from dsasr.tracking import swap_replay

    print(shlex.join(swap_replay.overrides(args.run)))
