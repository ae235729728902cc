"""Starting a Triton kernel, and saying what to do when it does not start."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch

from dsasr.utils.errors import first_line


class KernelError(RuntimeError):
    """A Triton kernel did not compile or start. The message says how to go on without it."""


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """``kernel[grid](*args, **options)`` on the device of the first argument.

    An empty grid starts nothing. Raises `KernelError`; running out of memory stays what it is.
    """
    if 0 in grid:
        return
    device = args[0].device
    try:
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            kernel[grid](*args, **options)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # Triton's compiler and the driver raise many types
        name = getattr(kernel, "__name__", None) or kernel.fn.__name__
        raise KernelError(
            f"the Triton kernel {name.strip('_')} failed on {device}"
            f" ({first_line(error)}): set DSASR_KERNELS=torch, or kernels=torch in the"
            " recipe, to go on without Triton; =reference for plain torch"
        ) from error
