"""What the benchmarks share: the machine, the clock, peak memory, and the record of results."""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from dsasr.utils.environment import commit, machine, package_versions
from dsasr.utils.memory import process_bytes

RESULTS = Path(__file__).parent / "results.jsonl"
_ROOT = Path(__file__).parent.parent.parent
_PACKAGES = ("torch", "triton", "deepspeed", "transformers", "liger-kernel", "cut-cross-entropy")


def record(bench: str, **fields: Any) -> dict[str, Any]:
    """Print one JSON line with the machine, versions and commit, and append it to results.jsonl.

    DSASR_BENCH_RESULTS names another file to append to; empty, none.
    """
    line = {"bench": bench, **fields, **about()}
    text = json.dumps(line, ensure_ascii=False)
    print(text, flush=True)
    target = os.environ.get("DSASR_BENCH_RESULTS", str(RESULTS))
    if target:
        with open(target, "a", encoding="utf-8") as file:
            file.write(text + "\n")
    return line


def about() -> dict[str, Any]:
    """The machine's name, cores and threads, the versions, the commit ("+": changed since)."""
    code = [_ROOT / "dsasr", _ROOT / "tools" / "bench"]
    return {
        "machine": machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), **package_versions(_PACKAGES)},
        "commit": commit(code, ignore=RESULTS.name),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def clock(device: torch.device | str) -> str:
    """What seconds are counted by: device events, CPU time where one thread works, or the wall.

    One thread's CPU time, the system's work for it included, is what others on the machine change
    least.
    """
    if torch.device(device).type == "cuda":
        return "device events"
    return "cpu time" if torch.get_num_threads() == 1 else "wall"


def seconds(run: Callable[[], Any], device: torch.device | str = "cpu") -> float:
    """How long ``run`` takes, by `clock`."""
    if torch.device(device).type != "cuda":
        now = time.process_time if clock(device) == "cpu time" else time.perf_counter
        start = now()
        run()
        return now() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000


def alternate(
    sides: dict[str, Callable[[], Any]],
    rounds: int,
    device: torch.device | str = "cpu",
    warm_up: int = 1,
) -> dict[str, list[float]]:
    """Seconds of each side, in turn, ``rounds`` times after ``warm_up`` that do not count."""
    taken: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(warm_up + rounds):
        for name, run in sides.items():
            found = seconds(run, device)
            if turn >= warm_up:
                taken[name].append(found)
        if sys.stderr.isatty():
            print(f"\r  round {turn + 1} of {warm_up + rounds}", end="", file=sys.stderr)
    if sys.stderr.isatty():
        print(file=sys.stderr)
    return taken


def median_and_spread(taken: list[float]) -> tuple[float, float]:
    """Median in ms, and (third − first quartile) / median; with two values, their distance."""
    middle = statistics.median(taken)
    first, _, third = statistics.quantiles(taken, method="inclusive") if len(taken) > 1 else [0] * 3
    return 1000 * middle, (third - first) / middle


def peak_bytes(run: Callable[[], Any], device: torch.device | str = "cpu") -> int:
    """The most memory that ``run`` holds above what is held already.

    On a CPU that is this process's resident set by Linux's count, so measure there in a fresh
    process: freed memory that the allocator kept would hide what ``run`` needs.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = process_bytes("VmRSS")
    run()
    return process_bytes("VmHWM") - before


def matrix_rate(
    size: int, dtype: torch.dtype, device: torch.device | str, rounds: int = 7
) -> float:
    """FLOP/s of the library's square matrix product on random data."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    taken = alternate({"mm": lambda: torch.mm(a, b, out=out)}, rounds, device, warm_up=3)["mm"]
    return 2 * size**3 / statistics.median(taken)


def copy_rate(size: int, device: torch.device | str, rounds: int = 7) -> float:
    """Bytes read and written per second by a copy of ``size`` bytes."""
    source = torch.empty(size, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    taken = alternate({"copy": lambda: target.copy_(source)}, rounds, device, warm_up=3)["copy"]
    return 2 * size / statistics.median(taken)
