"""Processes for work shard by shard: one thread each, in order, with a progress bar."""

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


def each(
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
        pool.shutdown(cancel_futures=True)  # after an interrupt, only what has begun is finished


def _prepare() -> None:
    """One thread: processes that have a thread per core each wait for each other's threads.

    A fork of a process whose threads have started would hang in its first parallel operation. The
    parent alone answers interrupts.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["OMP_NUM_THREADS"] = "1"  # for a torch that the work is yet to import
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
