"""A map over single-threaded processes, in order, with a progress bar."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from dsasr.utils.errors import UserError
from dsasr.utils.progress import Bar

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_in_processes(
    work: Callable[[Item], Result],
    items: Sequence[Item],
    processes: int | None = None,
    desc: str = "",
    unit: str = "shard",
) -> Iterator[Result]:
    """``work(item)`` for every item, in order, over ``processes`` (None: one per core).

    Raises `UserError` for an impossible number of processes and for one that was killed.
    """
    if processes is not None and processes < 1:
        raise UserError(f"--processes {processes}: use at least 1")
    count = min(processes or os.cpu_count() or 1, len(items))
    bar = {"total": len(items), "desc": desc, "unit": unit, "delay": 1}
    if count <= 1:
        yield from Bar(map(work, items), **bar)
        return
    pool = ProcessPoolExecutor(count, initializer=_prepare)
    try:
        yield from Bar(pool.map(work, items), **bar)
    except BrokenProcessPool:
        raise UserError(
            "a process was killed, for want of memory perhaps: run again with fewer --processes"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)  # after an interrupt, only started items finish


def _prepare() -> None:
    """Use one thread, and leave interrupts to the parent.

    Processes with a thread per core each would compete for the cores, and a fork of a process whose
    threads have started would hang in its first parallel operation.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["OMP_NUM_THREADS"] = "1"  # for torch, if the work imports it later
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
