"""What ranks say to each other, in the few forms that the project needs, and how they part; one
rank works too.

Whatever changes what a rank does next goes through `broadcast` or `any_rank`, so that it is decided
once and every rank makes the same collective calls.
"""

from __future__ import annotations

import atexit
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


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def main_rank() -> bool:
    return rank() == 0


def device() -> torch.device:
    """Where this rank computes: its own GPU, or the CPU (also under ``DS_ACCELERATOR=cpu``)."""
    if _has_gpu() and os.environ.get("DS_ACCELERATOR") != "cpu":
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


# Asked many times a step, and torch asks the driver each time.
_has_gpu = functools.cache(torch.cuda.is_available)


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def broadcast(value: T) -> T:
    """Rank 0's ``value`` (plain Python data), on every rank."""
    if world() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, device=device())
    return box[0]


def by_main(attempt: Callable[[], T]) -> T:
    """What ``attempt()`` gives on rank 0, on every rank; an `OSError` there is raised on all."""
    result, problem = None, None
    if main_rank():
        try:
            result = attempt()
        except OSError as error:
            problem = str(error)
    result, problem = broadcast((result, problem))
    if problem is not None:
        raise OSError(problem)
    return result


def gather(value: T) -> list[T]:
    """Every rank's ``value`` (plain Python data) in rank order, on every rank."""
    if world() == 1:
        return [value]
    values: list = [None] * world()
    dist.all_gather_object(values, value)
    return values


def any_rank(flag: bool) -> bool:
    """Whether ``flag`` holds on at least one rank."""
    if world() == 1:
        return flag
    box = torch.tensor([int(flag)], device=device(), dtype=torch.int32)
    dist.all_reduce(box, op=dist.ReduceOp.MAX)
    return bool(box.item())


def sum_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """The element-wise sum over ranks, in place; returns ``tensor``."""
    if world() > 1:
        dist.all_reduce(tensor)
    return tensor


def leave() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def end_process(code: int = 0) -> NoReturn:
    """Leave the process group and end this process; what is registered for its exit is done first.

    The interpreter's own end is left out, as `multiprocessing` leaves it out in its children.
    A thread of Gloo's lets go of a collective's tensors only after it has told the caller that all
    is done; where that falls into the interpreter's end, the process aborts (exit code 134) and a
    finished run counts as a failed one. Leaving the group does not wait for those threads as long
    as somebody, such as DeepSpeed, holds one of its groups.
    """
    leave()
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
