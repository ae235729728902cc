"""The memory of this process."""

from __future__ import annotations

from pathlib import Path


def process_bytes(name: str = "VmRSS") -> int:
    """Bytes of a field of Linux's /proc/self/status: VmRSS is what is in memory now, VmHWM the most
    that was, VmData what is mapped. Raises OSError where there is none."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {name}")
