"""The worker pool: in order, through kills, errors and results of any size."""

from __future__ import annotations

import gc
import os
import platform
import resource
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import dataclass

import numpy as np
import psutil
import pytest
import torch

from dsasr.data.dataloader.workers import WorkerDied, WorkerPool, run_inline
from dsasr.utils.errors import UserError


@dataclass(frozen=True)
class Job:
    number: int
    rows: int = 3
    sleep: float = 0.0
    raises: bool = False
    die: bool = False
    text: int = 0


def work(job: Job, allocate):
    if job.die:
        os.kill(os.getpid(), signal.SIGKILL)
    if job.raises:
        raise UserError(f"job {job.number}")
    time.sleep(job.sleep)
    array = allocate((job.rows, 5))
    array[:] = np.random.default_rng(job.number).random((job.rows, 5), np.float32)
    return array, {"number": job.number, "text": "x" * job.text, "pid": os.getpid()}


def run(pool: WorkerPool, jobs: list[Job]):
    todo, taken = list(jobs), 0
    while taken < len(jobs):
        while todo and pool.room:
            pool.submit(todo.pop(0))
        yield pool.take()
        taken += 1


@pytest.fixture
def pool():
    pools = []

    def make(workers=2, prefetch=3, slot_bytes=1 << 16):
        pools.append(WorkerPool(work, workers, prefetch, slot_bytes))
        return pools[-1]

    yield make
    for one in pools:
        pids = one.pids()
        one.close()
        assert not any(psutil.pid_exists(pid) for pid in pids)


def same(payload, job: Job) -> bool:
    here = run_inline(work, job)
    return torch.equal(payload.array, here.array) and payload.rest["number"] == job.number


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_results_come_in_order_whatever_the_timing(pool, workers) -> None:
    jobs = [Job(i, rows=i % 4, sleep=0.01 * ((i * 7) % 3)) for i in range(20)]
    results = list(run(pool(workers), jobs))
    assert all(same(p, j) for p, j in zip(results, jobs, strict=True))
    assert len({p.rest["pid"] for p in results}) == workers


def test_results_larger_than_a_slot_still_pass(pool) -> None:
    jobs = [
        Job(0, rows=10_000),
        Job(1),
        Job(2, text=300_000),
        Job(3, rows=10_000, text=200_000),
        Job(4, rows=0),
        Job(5, rows=3276),  # fills the slot to the brim: no room for the rest
    ]
    results = list(run(pool(1, 6), jobs))
    assert all(same(p, j) for p, j in zip(results, jobs, strict=True))
    assert [len(p.rest["text"]) for p in results] == [j.text for j in jobs]


def test_a_task_larger_than_a_slot_is_refused(pool) -> None:
    with pytest.raises(ValueError, match="does not fit"):
        pool(1).submit("x" * 70_000)


def test_a_result_is_the_receivers_own(pool) -> None:
    pool = pool(1, 1)
    results = list(run(pool, [Job(i) for i in range(5)]))
    assert all(same(p, Job(i)) for i, p in enumerate(results))


def test_slots_are_reused_only_when_their_arrays_are_gone(pool) -> None:
    """A view outlives its batch; arrays beyond the spare slots are copies; slots are reused."""
    pool = pool(1, 2)
    spans = lambda p: (p.array.data_ptr(), p.array.data_ptr() + p.array.nbytes)  # noqa: E731
    jobs = [Job(i, rows=50) for i in range(30)]
    results = run(pool, jobs)
    payloads = [next(results) for _ in range(6)]
    ends = [spans(p) for p in payloads]
    assert len({start for start, _ in ends}) == 6, "two live arrays share memory"
    views = [p.array[3:] for p in payloads]
    want = [view.clone() for view in views]
    del payloads
    assert len(pool.workers[0].slots) + len(pool.workers[0].outstanding) == 2
    addresses = set()
    for payload, job in zip(results, jobs[6:], strict=False):
        assert same(payload, job)
        addresses.add(payload.array.data_ptr())
        if job.number == 15:
            assert all(torch.equal(a, b) for a, b in zip(views, want, strict=True))
            views.clear()
            addresses.clear()
    assert len(addresses) <= 4, "the slots are used in turn"
    del payload
    gc.collect()
    worker = pool.workers[0]
    assert sorted(worker.slots) == [0, 1, 2, 3] and not worker.outstanding


def use_memory(job: Job, allocate):
    """Eight tensors of one to three megabytes at once; page faults since the process began."""
    assert len([torch.ones(job.rows, 1 << 18) for _ in range(8)]) == 8
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    return allocate((1, 1)), faults


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc is glibc's to tune")
def test_a_worker_reuses_the_memory_of_its_last_task() -> None:
    """A megabyte is 256 pages: without this, a thousand faults for each task."""
    workers = WorkerPool(use_memory, 1, 1, 1 << 16)
    faults = [payload.rest for payload in run(workers, [Job(i, rows=1 + i % 3) for i in range(40)])]
    workers.close()
    assert (faults[-1] - faults[9]) / 30 < 400, faults


def test_killed_workers_are_replaced_and_nothing_changes(pool) -> None:
    jobs = [Job(i, sleep=0.02) for i in range(30)]
    workers = pool(2, 3)
    results = []
    for i, payload in enumerate(run(workers, jobs)):
        results.append(payload)
        if i in (3, 4, 12, 20):
            os.kill(workers.pids()[i % 2], signal.SIGKILL)
        if i == 16:
            for pid in workers.pids():
                os.kill(pid, signal.SIGKILL)
    assert all(same(p, j) for p, j in zip(results, jobs, strict=True))
    assert len({p.rest["pid"] for p in results}) > 2
    time.sleep(0.05)
    assert workers.ready == 0


def test_a_task_that_kills_its_workers_ends_with_its_name(pool) -> None:
    workers = pool(1, 2)
    workers.submit(Job(0))
    workers.submit(Job(1, die=True))
    assert workers.take().rest["number"] == 0
    with pytest.raises(WorkerDied, match=r"exit code -9.*Job\(number=1"):
        workers.take()


def test_errors_arrive_as_themselves_and_the_worker_lives_on(pool) -> None:
    workers = pool(1, 3)
    for job in (Job(0), Job(1, raises=True), Job(2)):
        workers.submit(job)
    pid = workers.take().rest["pid"]
    with pytest.raises(UserError, match="job 1"):
        workers.take()
    assert workers.take().rest == {"number": 2, "text": "", "pid": pid}


def test_ready_counts_what_waits(pool) -> None:
    workers = pool(2, 2)
    for i in range(4):
        workers.submit(Job(i))
    deadline = time.monotonic() + 5
    while workers.ready < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert workers.ready == 4 and workers.room == 0
    workers.take()
    assert workers.ready == 3 and workers.room == 1


def test_workers_ignore_the_signals_that_stop_their_consumer(pool) -> None:
    workers = pool(1, 2)
    workers.submit(Job(0))
    pid = workers.take().rest["pid"]
    for kind in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        os.kill(pid, kind)
    workers.submit(Job(1))
    assert workers.take().rest["pid"] == pid


@pytest.mark.parametrize("how", ["kill", "exit", "raise"])
def test_no_worker_outlives_its_consumer(tmp_path, how) -> None:
    code = textwrap.dedent("""
        import os, sys, time
        sys.path.insert(0, sys.argv[1])
        import test_workers as t
        from dsasr.data.dataloader import workers
        workers.ORPHAN_SECONDS = 0.2
        pool = workers.WorkerPool(t.work, 2, 2, 1 << 16)
        other = workers.WorkerPool(t.work, 1, 1, 1 << 16)  # holds the first one's pipes open
        pool.submit(t.Job(0, sleep=0.05))
        print(*pool.pids(), *other.pids(), flush=True)
        if sys.argv[2] == "kill":
            time.sleep(60)
        if sys.argv[2] == "raise":
            raise SystemExit(3)
    """)
    folder = __file__.rsplit("/", 1)[0]
    process = subprocess.Popen(
        [sys.executable, "-c", code, folder, how], stdout=subprocess.PIPE, text=True
    )
    pids = [int(pid) for pid in process.stdout.readline().split()]
    assert len(pids) == 3
    if how == "kill":
        process.kill()
    process.wait(20)
    process.stdout.close()
    deadline = time.monotonic() + 5
    while any(_runs(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(_runs(pid) for pid in pids)


def _runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
