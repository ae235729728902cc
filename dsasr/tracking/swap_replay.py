"""The encoder swaps of a run, as recipe overrides that repeat them.

In a concurrent run the steps of the swaps depend on the speed of two jobs. A colocated run with
these overrides loads the same encoders at the same steps, and so repeats it bit for bit.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from dsasr.schedule import GIVEN
from dsasr.tracking.run_log import Row, read_events
from dsasr.utils.errors import UserError


def planned_swaps(events: Sequence[Row]) -> list[dict[str, int]]:
    """The swaps of the sft branch as entries of ``drift.swaps``; of one step, the last counts."""
    pretrain_step: dict[int, int] = {}  # by sft step
    for event in events:
        if event["event"] == "swap" and event["cause"] != GIVEN:
            pretrain_step[event["sft"]] = event["pretrain"]
    return [{"pretrain": p, "sft": s} for s, p in sorted(pretrain_step.items())]


def overrides(folder: Path) -> list[str]:
    """``key=value`` overrides that repeat the swaps of the run in ``folder``.

    Raises `UserError` where its events cannot be read in full or have no swap.
    """
    swaps = planned_swaps(read_events(folder, strict=True))
    if not swaps:
        raise UserError(f"{folder} has swapped no encoder yet: there is no history to repeat")
    return ["branch=both", "drift.mode=fixed", f"drift.swaps={json.dumps(swaps)}"]
