"""A pool of worker processes that turns tasks into payloads in order, and replaces killed workers.

A task is a pure description, so a worker that dies (``kill -9``, out of memory) is replaced and its
tasks are repeated: the consumer gets the same payloads. Tasks and results travel through shared
anonymous memory, one slot for each outstanding task; the pipes carry a few bytes for each, and
so never block. A result stays in its slot as long as the consumer uses its array; a consumer that
keeps more arrays than there are spare slots gets copies.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import mmap
import multiprocessing
import os
import pickle
import signal
import struct
import time
import traceback
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any

import numpy as np
import torch

from dsasr.utils.errors import Failure
from dsasr.utils.troubleshooting import see

ORPHAN_SECONDS = 5.0  # how often a waiting worker checks that its consumer is alive
MAX_DEATHS = 3  # of workers in a row on the same task, before the run stops
HEADER = struct.Struct("<qqq")  # task: slot, bytes, 0; result: slot, bytes of array, of the rest
ALIGN = 64
RETAINED_BYTES = 128 << 20  # freed memory that a worker keeps for its next task
SPARE = 2  # slots of each worker for arrays in use while all its tasks are outstanding

Allocate = Callable[[tuple[int, ...]], np.ndarray]
"""Gives float32 memory of a shape, not cleared; at most one call for each task."""

Work = Callable[[Any, Allocate], tuple[np.ndarray, Any]]
"""(task, allocate) → (the array that allocate gave, or its beginning; anything picklable)."""


class WorkerDied(Failure):
    """Workers died repeatedly on the same task."""


class WorkerFailed(RuntimeError):
    """The work raised something that does not pickle; the message holds the traceback."""


@dataclass
class Payload:
    """A task's result."""

    array: torch.Tensor  # float32; the receiver may keep and change it
    rest: Any


def run_inline(work: Work, task: Any) -> Payload:
    """Do a task in this process, without a pool."""
    array, rest = work(task, lambda shape: torch.empty(shape).numpy())
    return Payload(torch.from_numpy(array), rest)


@dataclass
class _Worker:
    process: Any = None
    tasks: Connection | None = None
    results: Connection | None = None
    memory: mmap.mmap | None = None
    outstanding: deque = field(default_factory=deque)  # (slot, task) in order of submission
    slots: deque = field(default_factory=deque)  # free ones; the last released is used first
    deaths: int = 0

    def release(self, slot: int) -> None:
        self.slots.append(slot)


class WorkerPool:
    """``workers`` forked processes; tasks go to them in turn, results come in submission order.

    ``slot_bytes`` bounds a result's shared memory; larger ones go through the pipe, slower. Memory
    is allocated only as far as it is used. A task must fit a slot.
    """

    def __init__(self, work: Work, workers: int, prefetch: int, slot_bytes: int) -> None:
        self.work, self.depth = work, max(prefetch, 1)
        self.slot_bytes = -(-max(slot_bytes, 1 << 16) // mmap.PAGESIZE) * mmap.PAGESIZE
        self.context = multiprocessing.get_context("fork")
        self.counters = mmap.mmap(-1, mmap.PAGESIZE * (1 + workers * 8 // mmap.PAGESIZE))
        self.done = np.frombuffer(self.counters, np.int64, workers)  # results computed, by worker
        self.taken = self.submitted = 0
        self.workers = [_Worker() for _ in range(workers)]
        for number, worker in enumerate(self.workers):
            worker.memory = mmap.mmap(-1, self.slot_bytes * (self.depth + SPARE))
            worker.slots.extend(range(self.depth + SPARE))
            self._start(number)
        _open_pools.add(self)

    @property
    def room(self) -> int:
        """Tasks that can be submitted now."""
        return len(self.workers) * self.depth - (self.submitted - self.taken)

    @property
    def ready(self) -> int:
        """Results computed and not yet taken: the queue's depth."""
        return max(int(self.done.sum()) - self.taken, 0)

    def submit(self, task: Any) -> None:
        assert self.room > 0, "the pool is full: take a result first"
        worker = self.workers[self.submitted % len(self.workers)]
        self.submitted += 1
        slot = worker.slots.pop()
        worker.outstanding.append((slot, task))
        self._send(worker, slot, task)

    def take(self) -> Payload:
        """The oldest submitted task's result; waits for it. Raises what the work raised."""
        assert self.submitted > self.taken, "nothing was submitted"
        number = self.taken % len(self.workers)
        worker = self.workers[number]
        while True:
            ready = wait([worker.results, worker.process.sentinel])
            if worker.results in ready:
                with contextlib.suppress(EOFError, OSError):
                    payload = self._receive(worker)
                    break
            self._replace(number)
        worker.outstanding.popleft()
        worker.deaths = 0
        self.taken += 1
        if isinstance(payload, BaseException):
            raise payload
        return payload

    def close(self) -> None:
        """Stop the workers. Whatever was not taken is dropped."""
        _open_pools.discard(self)
        for worker in self.workers:
            if worker.tasks is not None:
                worker.tasks.close()
                worker.results.close()
        deadline = time.monotonic() + 0.2
        for worker in self.workers:
            if worker.process is not None:
                worker.process.join(max(deadline - time.monotonic(), 0))
                if worker.process.is_alive():
                    worker.process.kill()
                    worker.process.join()
        self.workers = []

    def pids(self) -> list[int]:
        return [worker.process.pid for worker in self.workers]

    def _start(self, number: int) -> None:
        worker = self.workers[number]
        theirs, worker.tasks = self.context.Pipe(duplex=False)
        worker.results, mine = self.context.Pipe(duplex=False)
        others = [end for w in self.workers for end in (w.tasks, w.results) if end is not None]
        worker.process = self.context.Process(
            target=_serve,
            args=(self.work, theirs, mine, worker.memory, self.slot_bytes, self.done, number),
            kwargs={"others": others},
            name=f"dsasr-worker-{number}",
        )
        worker.process.start()
        theirs.close()
        mine.close()

    def _replace(self, number: int) -> None:
        worker = self.workers[number]
        worker.process.join()
        worker.deaths += 1
        if worker.deaths >= MAX_DEATHS:
            raise WorkerDied(
                f"{worker.deaths} workers in a row died (exit code {worker.process.exitcode}) over "
                f"{_shown(worker.outstanding[0][1])}; out of memory? Lower "
                "data.dataloader.num_workers, data.dataloader.prefetch or "
                "data.dataloader.batch.frames (or the stage's own batch.frames)"
                f"{see('out-of-memory')}"
            )
        worker.tasks.close()
        worker.results.close()
        worker.tasks = worker.results = None
        # Results of the dead worker that were not taken are computed again.
        self.done[number] = self._taken_from(number)
        self._start(number)
        for slot, task in worker.outstanding:
            self._send(worker, slot, task)

    def _taken_from(self, number: int) -> int:
        count = len(self.workers)
        return self.taken // count + (number < self.taken % count)

    def _send(self, worker: _Worker, slot: int, task: Any) -> None:
        data = pickle.dumps(task, pickle.HIGHEST_PROTOCOL)
        if len(data) > self.slot_bytes:
            # Through the pipe it could block against a worker that blocks on a large result.
            raise ValueError(f"a task of {len(data)} bytes does not fit a slot: {_shown(task)}")
        start = slot * self.slot_bytes
        worker.memory[start : start + len(data)] = data
        # A dead worker's pipe is broken; it is replaced when its result is asked for.
        with contextlib.suppress(BrokenPipeError, OSError):
            worker.tasks.send_bytes(HEADER.pack(slot, len(data), 0))

    def _receive(self, worker: _Worker) -> Payload | BaseException:
        """The next result; its slot is free again at once, or when the consumer drops the array."""
        slot, array_bytes, rest_bytes = HEADER.unpack(worker.results.recv_bytes())
        if array_bytes < 0:
            kind, shape, rest, data = pickle.loads(worker.results.recv_bytes())
            source = np.frombuffer(bytearray(data or 4), np.float32, len(data) // 4)
        else:
            start = slot * self.slot_bytes
            tail = start + array_bytes
            kind, shape, rest = pickle.loads(memoryview(worker.memory)[tail : tail + rest_bytes])
            source = np.frombuffer(worker.memory, np.float32, array_bytes // 4, start)
        in_use = self.depth + SPARE - len(worker.slots) - len(worker.outstanding)
        if array_bytes > 0 and in_use < SPARE:
            # The storage of the tensor, and so every view of it, keeps ``source`` alive.
            weakref.finalize(source, worker.release, slot).atexit = False
        else:
            source = source.copy() if array_bytes > 0 else source
            worker.release(slot)
        return rest if kind == "error" else Payload(torch.from_numpy(source.reshape(shape)), rest)


def _shown(task: Any) -> str:
    text = str(getattr(task, "describe", lambda: repr(task))())
    return text if len(text) < 500 else text[:497] + "..."


_open_pools: weakref.WeakSet[WorkerPool] = weakref.WeakSet()


@atexit.register
def _close_pools() -> None:
    # Registered after multiprocessing's own hook and so run before it, which joins the workers.
    for pool in list(_open_pools):
        pool.close()


def keep_freed_memory() -> None:
    """Let glibc keep up to `RETAINED_BYTES` of this process's freed memory.

    Otherwise the kernel would map the same megabytes anew for every utterance, page by page, which
    took a third of the features' time on a virtual machine. Other C libraries are unaffected.
    """
    trim_threshold, mmap_threshold = -1, -3  # malloc.h
    with contextlib.suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(trim_threshold, RETAINED_BYTES)
        mallopt(mmap_threshold, 32 << 20)


def _incoming(tasks: Connection, parent: int) -> Iterator[bytes]:
    while True:
        try:
            # The pipe's other end may stay open in unrelated children of a killed consumer.
            while not tasks.poll(ORPHAN_SECONDS):
                if os.getppid() != parent:
                    return
            yield tasks.recv_bytes()
        except (EOFError, OSError):
            return


def _serve(
    work: Work,
    tasks: Connection,
    results: Connection,
    memory: mmap.mmap,
    slot_bytes: int,
    done: np.ndarray,
    number: int,
    others: Sequence[Connection],
) -> None:
    # The consumer decides when to stop; Slurm's signals reach all processes of a step.
    for kind in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(kind, signal.SIG_IGN)
    for end in others:
        end.close()
    _open_pools.clear()
    torch.set_num_threads(1)  # the parent's threads did not survive the fork
    keep_freed_memory()
    gc.freeze()  # the objects from before the fork: traversing them would copy their pages
    for header in _incoming(tasks, os.getppid()):
        slot, size, _ = HEADER.unpack(header)
        start = slot * slot_bytes
        task = pickle.loads(memory[start : start + size])
        message = _run_task(work, task, memory, start, slot_bytes, slot)
        try:
            done[number] += 1
            for part in message:
                results.send_bytes(part)
        except (BrokenPipeError, OSError):
            break
    os._exit(0)


def _run_task(
    work: Work, task: Any, memory: mmap.mmap, start: int, slot_bytes: int, slot: int
) -> list[bytes]:
    """Do the task and return the messages to send. The array lies in the slot if it fits."""

    def allocate(shape: tuple[int, ...]) -> np.ndarray:
        count = int(np.prod(shape))
        if 4 * count + ALIGN > slot_bytes:
            return np.empty(shape, np.float32)
        array = np.frombuffer(memory, np.float32, count, start).reshape(shape)
        allocated.append(array)
        return array

    allocated: list[np.ndarray] = []
    try:
        array, rest = work(task, allocate)
        head = ("ok", array.shape, rest)
    except BaseException as error:  # `WorkerPool.take` raises it in the consumer
        array, head = np.zeros(0, np.float32), ("error", (0,), _portable(error))
    inside = bool(allocated) and array.ctypes.data == allocated[-1].ctypes.data
    tail = pickle.dumps(head, pickle.HIGHEST_PROTOCOL)
    size = array.nbytes
    if (inside or not size) and size + len(tail) <= slot_bytes:
        memory[start + size : start + size + len(tail)] = tail
        return [HEADER.pack(slot, size, len(tail))]
    return [HEADER.pack(slot, -1, 0), pickle.dumps((*head, array.tobytes()))]


def _portable(error: BaseException) -> BaseException:
    """A copy of the error if it can be pickled, else a `WorkerFailed` that has its traceback."""
    trace = "".join(traceback.format_exception(error))
    try:
        copy = pickle.loads(pickle.dumps(error))
    except Exception:  # an error's class may raise anything when it is pickled or built again
        return WorkerFailed(trace)
    copy.__cause__ = None
    if hasattr(copy, "add_note"):
        copy.add_note(f"in a worker:\n{trace}")
    # Notes are pickled with the error. Python 3.10 has none, and shows the error alone.
    return copy
