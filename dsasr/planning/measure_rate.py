"""The rate at which this machine multiplies, measured; a plan needs it."""

from __future__ import annotations

import time

import torch


def measure_rate(seconds: float = 1.0, size: int = 2048) -> float:
    """TFLOP/s of matrix products on this machine's GPU (bf16), or CPU (fp32)."""
    gpu = torch.cuda.is_available()
    kind = {"device": "cuda", "dtype": torch.bfloat16} if gpu else {}
    size = size * 4 if gpu else size
    a, b = torch.randn(size, size, **kind), torch.randn(size, size, **kind)
    a @ b
    rounds, started = 0, time.monotonic()
    while (spent := time.monotonic() - started) < seconds:
        a @ b
        if gpu:
            torch.cuda.synchronize()
        rounds += 1
    return rounds * 2 * size**3 / spent / 1e12
