"""Timed measurements of a rank, each of about a second: products, clocks, all-reduce, disks.

The collective ones are called by all ranks in the same order. Those on disks run in a thread that
is given up after a while: a file system that hangs must not hang its check.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from dsasr.data.shards.storage import ShardReadError, ShardStorage, ShardTruncated
from dsasr.data.shards.urls import is_pipe, is_remote
from dsasr.doctor.machine import now
from dsasr.planning.measure_rate import measure_rate
from dsasr.utils import distributed
from dsasr.utils.errors import first_line

T = TypeVar("T")
CLOCK_ROUNDS = 5
MIB = 1 << 20
GPU_BYTES, CPU_BYTES = 256 * MIB, 4 * MIB  # of an all-reduce
ROUNDS = 20  # of it at most
READ_SECONDS, READ_BYTES = 1.5, 256 * MIB  # of a rank, at most
WRITE_SECONDS, WRITE_BYTES = 1.5, 256 * MIB
GIVEN_UP = 15.0  # seconds after which a disk does not answer
SEEN_SECONDS = 3.0  # in which a file of one node must be seen by all; NFS is not at once


@dataclass(frozen=True)
class Transfer:
    """Bytes that a rank has read or written; ``problem``: why not, empty: it has."""

    bytes: int = 0
    seconds: float = 0.0
    problem: str = ""


def within(seconds: float, act: Callable[[], T]) -> T:
    """What ``act`` returns or raises. Raises `TimeoutError` after ``seconds``; it is then left
    alone."""
    box: list[tuple[bool, Any]] = []

    def work() -> None:
        try:
            box.append((True, act()))
        except BaseException as error:  # raised below, in the calling thread
            box.append((False, error))

    thread = threading.Thread(target=work, name="doctor", daemon=True)
    thread.start()
    thread.join(seconds)
    if not box:
        raise TimeoutError(f"no answer within {seconds:g} s")
    done, value = box[0]
    if not done:
        raise value
    return value


def products(seconds: float = 0.5) -> float:
    """TFLOP/s of this rank's matrix products, as the plan takes them; all ranks at once."""
    distributed.barrier()
    return measure_rate(seconds)


# -- with other ranks ----------------------------------------------------------------------------


def clock_offset() -> float:
    """Seconds by which this machine's clock is ahead of rank 0's, to some milliseconds;
    collective."""
    offsets = []
    for _ in range(CLOCK_ROUNDS):
        distributed.barrier()
        times = distributed.all_gather_object(now())
        offsets.append(times[distributed.rank()] - times[0])
    return statistics.median(offsets)


def all_reduce() -> float:
    """GB/s of an all-reduce over all ranks as nccl-tests counts its "busbw": what every rank sends,
    2 (n − 1) / n of the bytes, by the time. Collective; 0 with one rank."""
    world, device = distributed.world_size(), distributed.device()
    if world == 1:
        return 0.0
    size = GPU_BYTES if device.type == "cuda" else CPU_BYTES
    box = torch.zeros(size // 4, dtype=torch.float32, device=device)
    for _ in range(2):
        seconds = _timed(box)
    rounds = distributed.broadcast(max(2, min(ROUNDS, int(1 / max(seconds, 1e-6)))))
    fastest = min(_timed(box) for _ in range(rounds))
    return 2 * (world - 1) / world * size / fastest / 1e9


def _timed(box: torch.Tensor) -> float:
    distributed.barrier()
    started = time.monotonic()
    dist.all_reduce(box)
    if box.is_cuda:
        torch.cuda.synchronize()
    return time.monotonic() - started


def sees_folder(folder: Path) -> bool:
    """Whether a file that rank 0 makes in ``folder`` is seen by this rank too; collective."""
    mark = None
    if distributed.is_main_rank():
        with contextlib.suppress(OSError):  # which `write` reports
            mark = tempfile.NamedTemporaryFile(  # noqa: SIM115
                prefix=".doctor.", suffix=".tmp", dir=folder
            )
    try:
        name = distributed.broadcast(mark.name if mark else "")
        return not name or _appears(Path(name))
    finally:
        distributed.barrier()
        if mark is not None:
            mark.close()


def _appears(path: Path) -> bool:
    def look() -> bool:
        end = time.monotonic() + SEEN_SECONDS
        while path.name not in os.listdir(path.parent):
            if time.monotonic() > end:
                return False
            time.sleep(0.1)
        return True

    try:
        return within(GIVEN_UP, look)
    except OSError:  # TimeoutError is one
        return False


# -- alone ---------------------------------------------------------------------------------------


def existing(folder: Path) -> Path:
    """``folder``, or the nearest one above it that exists."""
    return next(path for path in (folder, *folder.absolute().parents) if path.is_dir())


def free_bytes(folder: Path) -> float:
    """Of the file system that ``folder`` is on, or would be; 0: unknown. Quotas are not
    known here."""
    try:
        return within(GIVEN_UP, lambda: shutil.disk_usage(existing(folder)).free)
    except OSError:
        return 0.0


def write(folder: Path) -> Transfer:
    """Write to ``folder``, or where it would be made, as a checkpoint is: with an fsync at the
    end. Nothing is left there."""

    def act() -> Transfer:
        data, count = os.urandom(8 * MIB), 0
        with tempfile.NamedTemporaryFile(
            prefix=".doctor.", suffix=".tmp", dir=existing(folder)
        ) as file:
            started = time.monotonic()
            while count < WRITE_BYTES and time.monotonic() - started < WRITE_SECONDS:
                file.write(data)
                file.flush()
                count += len(data)
            os.fsync(file.fileno())
            return Transfer(count, time.monotonic() - started)

    return _transfer(act)


def read(shards: Sequence[str], storage: ShardStorage) -> Transfer:
    """Read ``shards`` from their starts, one after the other; from the disk, where the page cache
    can be emptied of them. One try each."""
    config = replace(storage.config, timeout=GIVEN_UP / 3, attempts=1, cache_gb=0.0)
    storage = ShardStorage(config)

    def act() -> Transfer:
        started = time.monotonic()
        for shard in shards:
            if not is_pipe(shard):
                _forget(shard)
                _read_one(shard, storage, started + READ_SECONDS)
        storage.close()
        return Transfer(storage.bytes, time.monotonic() - started)

    return _transfer(act)


def _read_one(shard: str, storage: ShardStorage, deadline: float) -> None:
    offset = 0
    while storage.bytes < READ_BYTES and time.monotonic() < deadline:
        try:
            offset += len(storage.read(shard, offset, MIB))
        except ShardTruncated:  # its end
            return
        except ShardReadError:
            if not offset:
                raise
            return  # a server that answers so to a range behind the end


def _forget(shard: str) -> None:
    """Have the kernel drop what it has cached of a local shard."""
    if is_remote(shard) or not hasattr(os, "posix_fadvise"):
        return
    handle = os.open(shard.removeprefix("file://"), os.O_RDONLY)
    try:
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(handle)


def _transfer(act: Callable[[], Transfer]) -> Transfer:
    try:
        return within(GIVEN_UP, act)
    except Exception as error:  # of file systems of many kinds
        return Transfer(
            problem=str(error) if isinstance(error, TimeoutError) else first_line(error)
        )
