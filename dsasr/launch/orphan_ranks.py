"""End ranks whose launcher was killed.

DeepSpeed's launcher stops its ranks when it is terminated, but not when it is killed with
``kill -9``: they would go on training in the run folder beside the job that replaces them.
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
    """End this process soon after the launcher that started it; call it as early as possible.

    Returns the watching thread, or None without a launcher: a shell may end before the process
    that it has started.
    """
    if not any(name in os.environ for name in LAUNCHERS):
        return None
    return end_with_parents(stop)


def end_with_parents(stop: Callable[[int], Any] = os._exit) -> threading.Thread:
    """End this process soon after its parent process or the ``deepspeed`` command has ended."""
    at_start = parents()

    def watch() -> None:
        while parents() == at_start:
            time.sleep(POLL)
        print("the launcher of this rank has ended: so does the rank", flush=True)
        stop(ORPHANED)

    thread = threading.Thread(target=watch, name="orphan_ranks", daemon=True)
    thread.start()
    return thread


def parents() -> tuple[int, int]:
    """The ids of this process's parent, and of the ``deepspeed`` command above it (0: none)."""
    parent = os.getppid()
    above = parent_of(parent)
    return parent, above if "deepspeed" in _command(above) else 0


def parent_of(process: int) -> int:
    try:
        stat = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:  # not Linux, or the process has ended
        return 0
    return int(stat.rpartition(")")[2].split()[1])


def _command(process: int) -> str:
    try:
        words = Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return ""
    return " ".join(w.decode("utf-8", "replace") for w in words[:4])
