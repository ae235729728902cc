"""The few collectives of `torch.distributed` that the package uses; they work with one rank too.

Whatever changes what a rank does next goes through `broadcast` or `any_rank`, so that it is decided
once and every rank makes the same collective calls ("No rank alone").
"""

from __future__ import annotations

import atexit
import datetime
import functools
import os
import sys
import threading
from collections.abc import Callable
from typing import NoReturn, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main_rank() -> bool:
    return rank() == 0


def device() -> torch.device:
    """The device of this rank: its own GPU, or the CPU (also under ``DS_ACCELERATOR=cpu``)."""
    if _has_gpu() and os.environ.get("DS_ACCELERATOR") != "cpu":
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


# `device` is called many times a step, and torch queries the driver each time.
_has_gpu = functools.cache(torch.cuda.is_available)


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def broadcast(value: T) -> T:
    """Rank 0's ``value`` (plain Python data), on every rank."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, device=device())
    return box[0]


def on_main_rank(function: Callable[[], T]) -> T:
    """Call ``function`` on rank 0 and broadcast its result; its `OSError` is raised on all ranks.

    Collective.
    """
    result, problem = None, None
    if is_main_rank():
        try:
            result = function()
        except OSError as error:
            problem = str(error)
    result, problem = broadcast((result, problem))
    if problem is not None:
        raise OSError(problem)
    return result


def all_gather_object(value: T) -> list[T]:
    """Every rank's ``value`` (plain Python data) in rank order, on every rank."""
    if world_size() == 1:
        return [value]
    values: list = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def any_rank(flag: bool) -> bool:
    """Whether ``flag`` is true on at least one rank."""
    if world_size() == 1:
        return flag
    box = torch.tensor([int(flag)], device=device(), dtype=torch.int32)
    dist.all_reduce(box, op=dist.ReduceOp.MAX)
    return bool(box.item())


class DelayedAnyRank:
    """`any_rank` that neither host nor device waits for: each call returns what holds for the flags
    of the call before, the same on every rank. Every call is collective.

    With one rank there is no delay. On a GPU the host waits at most for the device to come to the
    call before, so a queue of work for it remains.
    """

    def __init__(self) -> None:
        self._work: dist.Work | None = None
        self._flag = torch.zeros(1, dtype=torch.int32)
        self._copied: torch.cuda.Event | None = None

    def __call__(self, flag: bool) -> bool:
        if world_size() == 1:
            return flag
        before = self.settle()
        box = torch.full((1,), int(flag), dtype=torch.int32, device=device())
        self._work = dist.all_reduce(box, op=dist.ReduceOp.MAX, async_op=True)
        if box.is_cuda:
            self._work.wait()  # the device's queue waits, the host does not
            self._flag = torch.empty(1, dtype=torch.int32, pin_memory=True)
            self._flag.copy_(box, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()
        else:
            self._flag = box
        return before

    def settle(self) -> bool:
        """What holds for the flags of the last call; False where there was none."""
        if self._copied is not None:
            self._copied.synchronize()
        elif self._work is not None:
            self._work.wait()
        self._work = self._copied = None
        flag, self._flag = bool(self._flag.item()), torch.zeros(1, dtype=torch.int32)
        return flag


def failures(reason: str, name: str, seconds: float) -> list[str]:
    """Every rank's ``reason`` of having failed at what ``name`` names; empty where it has not.

    Unlike a collective it works where a rank has skipped some of the others' collectives. Raises
    `TimeoutError` where a rank has no word in ``seconds``: it still waits for those.
    """
    if world_size() == 1:
        return [reason]
    store = dist.distributed_c10d._get_default_store()
    keys = [f"dsasr/{name}/{number}" for number in range(world_size())]
    store.set(keys[rank()], reason)
    try:
        store.wait(keys, datetime.timedelta(seconds=seconds))
    except RuntimeError:
        raise TimeoutError(f"{name}: not every rank has ended it in {seconds:g} s") from None
    return [store.get(key).decode() for key in keys]


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum ``tensor`` over ranks in place, element by element; returns it."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def destroy_process_group() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def end_process(code: int = 0) -> NoReturn:
    """Destroy the process group, run the exit handlers (`atexit`) and end this process.

    The interpreter's own shutdown is skipped, as `multiprocessing` skips it in its children. A
    thread of Gloo releases a collective's tensors only after it has reported to the caller that the
    collective is done. Where that falls into the interpreter's shutdown, the process aborts (exit
    code 134) and a finished run counts as a failed one. Destroying the group does not wait for
    those threads as long as another object, such as DeepSpeed, refers to one of its groups.
    """
    destroy_process_group()
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
