"""Stop ranks whose launcher has ended.

DeepSpeed's launcher stops its ranks when it is terminated, but not when it is killed with
``kill -9``, and the ``deepspeed`` command above it passes on no signal at all: the ranks would go
on training, detached. A rank that trains saves first, with all others; one that still loads
ends at once.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dsasr.launch.stop_request import StopRequest

ORPHANED = 75  # exit code: EX_TEMPFAIL of sysexits.h, "try again"
POLL = 0.5  # seconds
STOP_SECONDS = 60.0  # in which all ranks must have agreed to stop: one of them may be dead
SAVE_SECONDS = 1800.0  # that they may save
DEEPSPEED, TORCH = "CROSS_RANK", "TORCHELASTIC_RUN_ID"  # set by deepspeed's and torch's launchers
LAUNCH = "deepspeed.launcher.launch"  # the module that starts DeepSpeed's ranks on a node


def end_with_launcher(
    request: StopRequest, end: Callable[[int], Any] = os._exit
) -> threading.Thread | None:
    """Stop this process soon after the launcher that started it; call it as early as possible.

    Returns the watching thread, or None without a launcher: a shell may end before the process
    that it has started.
    """
    if DEEPSPEED in os.environ and not _launchers_live():
        end(ORPHANED)  # they ended before this rank could look at them
    if DEEPSPEED not in os.environ and TORCH not in os.environ:
        return None
    return end_with_parents(request, end)


def end_with_parents(
    request: StopRequest | None = None, end: Callable[[int], Any] = os._exit
) -> threading.Thread:
    """Stop this process soon after its parent process or the ``deepspeed`` command has ended.

    Without a ``request`` nothing is saved.
    """
    at_start = parents()

    def watch() -> None:
        while parents() == at_start:
            time.sleep(POLL)
        if request is not None and request.training:
            request.record("the end of its launcher")
            _wait_while(lambda: not request.saving, STOP_SECONDS)
            _wait_while(lambda: request.saving, SAVE_SECONDS)
        with contextlib.suppress(OSError):  # its output may have ended too
            print("the launcher of this rank has ended: so does the rank", flush=True)
        end(ORPHANED)

    thread = threading.Thread(target=watch, name="orphan_ranks", daemon=True)
    thread.start()
    return thread


def _wait_while(holds: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while holds() and time.monotonic() < deadline:
        time.sleep(POLL)


def _launchers_live() -> bool:
    """Whether DeepSpeed's launcher is above this process, and on one machine the ``deepspeed``
    command above it."""
    above = os.getppid()
    while above > 0:
        words = _words(above)
        if LAUNCH in words:
            # On several machines it is started through ssh.
            remote = any(word.startswith("--node_rank") for word in words)
            return remote or _is_deepspeed(parent_of(above))
        above = parent_of(above)
    return not Path("/proc/self/stat").is_file()  # not Linux: nobody knows


def parents() -> tuple[int, int]:
    """The ids of this process's parent, and of the ``deepspeed`` command above it (0: none)."""
    parent = os.getppid()
    above = parent_of(parent)
    return parent, above if _is_deepspeed(above) else 0


def _is_deepspeed(process: int) -> bool:
    return "deepspeed" in " ".join(_words(process)[:4])


def parent_of(process: int) -> int:
    try:
        stat = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:  # not Linux, or the process has ended
        return 0
    return int(stat.rpartition(")")[2].split()[1])


def _words(process: int) -> list[str]:
    """The words of a process's command line."""
    try:
        words = Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return []
    return [word.decode("utf-8", "replace") for word in words]
