"""A map over shards in single-threaded processes, in order, with a progress bar."""

from __future__ import annotations

import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from dsasr.utils.errors import UserError
from dsasr.utils.progress import Bar

Item = TypeVar("Item")
Result = TypeVar("Result")
AHEAD = 4  # items of a process that are given out before their results are taken


def map_in_processes(
    work: Callable[[Item], Result],
    items: Iterable[Item],
    processes: int | None = None,
    desc: str = "",
    total: int | None = None,
) -> Iterator[Result]:
    """``work(item)`` for every item, in order, over ``processes`` (None: one per core).

    Items are taken as they are needed, a few ahead of the results; ``total``: how many there are,
    where ``items`` has no length.
    Raises `UserError` for an impossible number of processes and for one that was killed.
    """
    if processes is not None and processes < 1:
        raise UserError(f"--processes {processes}: use at least 1")
    total = len(items) if total is None else total
    count = min(processes or os.cpu_count() or 1, total)
    bar = {"total": total, "desc": desc, "unit": "shard", "delay": 1}
    if count <= 1:
        yield from Bar(map(work, items), **bar)
        return
    pool = ProcessPoolExecutor(count, initializer=_prepare)
    try:
        yield from Bar(_results(pool, work, items, AHEAD * count), **bar)
    except BrokenProcessPool:
        raise UserError(
            "a process was killed, for want of memory perhaps: run again with fewer --processes"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)  # after an interrupt, only started items finish


def _results(
    pool: ProcessPoolExecutor, work: Callable[[Item], Result], items: Iterable[Item], most: int
) -> Iterator[Result]:
    """The results in order, with at most ``most`` items in the pool."""
    pending: deque[Future[Result]] = deque()
    for item in items:
        pending.append(pool.submit(work, item))
        if len(pending) >= most:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def _prepare() -> None:
    """Use one thread, and leave interrupts to the parent.

    Processes with a thread per core each would compete for the cores, and a fork of a process whose
    threads have started would hang in its first parallel operation.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["OMP_NUM_THREADS"] = "1"  # for torch, if the work imports it later
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
