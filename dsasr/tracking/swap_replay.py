"""The swap history of a run, as a recipe for repeating it.

``dsasr replay RUN`` reads a run folder's events and prints the overrides that make a
colocated run take the same encoders at the same steps: a concurrent run, whose swaps depend on how
fast two jobs went, can so be repeated bit for bit.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dsasr.utils.errors import UserError, run_tool
from dsasr.utils.io import read_lines


def read_events(folder: Path) -> list[dict[str, Any]]:
    """The events of a run folder; a torn last line is left out. Raises `UserError`."""
    try:
        lines = read_lines(folder / "events.jsonl")
    except OSError as error:
        raise UserError(f"{folder} is no run folder: {error.strerror}") from None
    events = []
    for number, line in enumerate(lines, 1):
        try:
            events.append(json.loads(line))
        except ValueError:
            if number < len(lines):
                raise UserError(f"{folder}/events.jsonl line {number} is not JSON") from None
    return events


def swaps(events: Sequence[dict[str, Any]]) -> list[dict[str, int]]:
    """The swaps of the sft branch as entries of ``drift.swaps``; the last of a step counts."""
    taken: dict[int, int] = {}
    for event in events:
        if event["event"] == "swap" and event["cause"] != "given":
            taken[event["sft"]] = event["pretrain"]
    return [{"pretrain": p, "sft": s} for s, p in sorted(taken.items())]


def overrides(folder: Path) -> list[str]:
    """``key=value`` overrides that repeat the history of the run in ``folder``."""
    held = swaps(read_events(folder))
    if not held:
        raise UserError(f"{folder} has swapped no encoder yet: there is no history to repeat")
    return ["branch=both", "drift.mode=fixed", f"drift.swaps={json.dumps(held)}"]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m dsasr.tracking.swap_replay", description=__doc__.splitlines()[0]
    )
    parser.add_argument("run", type=Path, help="the run folder (of a concurrent run: RUN/sft)")
    options = parser.parse_args(arguments)
    print(" ".join(shlex.quote(o) for o in overrides(options.run)))
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(main))
