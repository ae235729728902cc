"""The memory of this process and of the machine."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path


def process_bytes(name: str = "VmRSS") -> int:
    """Bytes of a field of Linux's /proc/self/status: VmRSS is what is in memory now, VmHWM the most
    that was, VmData what is mapped. Raises OSError where there is none."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {name}")


def available_bytes() -> int:
    """Bytes that the machine has free, within the limit of this process's control group."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) * 1024
    with suppress(OSError, ValueError):
        bound = int(Path("/sys/fs/cgroup/memory.max").read_text())
        free = min(free, bound - int(Path("/sys/fs/cgroup/memory.current").read_text()))
    return free
