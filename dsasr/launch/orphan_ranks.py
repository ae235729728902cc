"""Ranks whose launcher was killed end too.

DeepSpeed's launcher takes its ranks along when it is asked to end, but not when it is killed with
``kill -9``: they would train on beside the job that is started in its place, in the same folder.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ORPHANED = 75  # exit code: EX_TEMPFAIL of sysexits.h, "try again"
POLL = 0.5  # seconds
LAUNCHERS = ("CROSS_RANK", "TORCHELASTIC_RUN_ID")  # set by deepspeed's and torch's launchers


def end_with_launcher(stop: Callable[[int], Any] = os._exit) -> threading.Thread | None:
    """End this process soon after the launcher that started it; to be called as early as may be.

    Without a launcher, nothing is watched: a shell may end before what it has started.
    """
    if not any(name in os.environ for name in LAUNCHERS):
        return None
    return end_with_parents(stop)


def end_with_parents(stop: Callable[[int], Any] = os._exit) -> threading.Thread:
    """End this process soon after the one that started it, or after the ``deepspeed`` command."""
    began = parents()

    def watch() -> None:
        while parents() == began:
            time.sleep(POLL)
        print("whoever started this rank has ended: so does it", flush=True)
        stop(ORPHANED)

    thread = threading.Thread(target=watch, name="orphans", daemon=True)
    thread.start()
    return thread


def parents() -> tuple[int, int]:
    """This process's parent, and above it the ``deepspeed`` command, or 0."""
    parent = os.getppid()
    above = parent_of(parent)
    return parent, above if "deepspeed" in _command(above) else 0


def parent_of(process: int) -> int:
    try:
        held = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:  # no Linux, or gone
        return 0
    return int(held.rpartition(")")[2].split()[1])


def _command(process: int) -> str:
    try:
        words = Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return ""
    return " ".join(w.decode("utf-8", "replace") for w in words[:4])
