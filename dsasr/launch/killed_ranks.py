"""Which rank of this machine was killed, and its memory before, read from /proc.

Where memory is short the kernel ends a process with signal 9. The other ranks then fail in whatever
collective they were in, and their tracebacks name neither the rank nor the cause.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from dsasr.utils.troubleshooting import see

POLL = 0.2  # seconds; DeepSpeed's launcher collects a dead rank within one second
FIND = 10  # polls between two searches for ranks, once there are some
_GB = 1e9


@dataclass
class Rank:
    """A rank's process: its last known memory in bytes, and the signal that ended it (0: none)."""

    name: str
    resident: int = 0
    available: int = 0  # of the machine then
    signal: int = 0


class KilledRanks(threading.Thread):
    """Watches the processes that ``find`` names until it is stopped; used as a context."""

    def __init__(self, find: Callable[[], Iterable[int]]):
        super().__init__(name="killed_ranks", daemon=True)
        self._find, self._ended = find, threading.Event()
        self._ranks: dict[int, Rank] = {}

    def __enter__(self) -> KilledRanks:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self.join()

    def run(self) -> None:
        polls = 0
        while not self._ended.wait(POLL):
            if not self._ranks or polls % FIND == 0:
                for process in self._find():
                    self._ranks.setdefault(process, Rank(_rank_of(process)))
            polls += 1
            for process, rank in self._ranks.items():
                with contextlib.suppress(OSError, ValueError, IndexError):
                    _look(process, rank)

    def lines(self) -> list[str]:
        """One line for each rank that signal 9 has ended."""
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return [
            f"rank {rank.name} was killed (signal 9), as the kernel does where memory is short: "
            f"it had {rank.resident / _GB:.1f} GB of this machine's {total / _GB:.1f} GB, of which "
            f"{rank.available / _GB:.1f} GB were free; lower data.dataloader.batch.frames, "
            "data.dataloader.num_workers or the ranks of a machine, or give the job more memory"
            f"{see('out-of-memory')}"
            for rank in self._ranks.values()
            if rank.signal == 9
        ]


def _look(process: int, rank: Rank) -> None:
    """Bring ``rank`` up to date. Raises OSError for a process that is gone."""
    stat = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace")
    fields = stat.rpartition(")")[2].split()  # from the third field of proc(5) on
    if fields[0] == "Z":
        rank.signal = int(fields[49]) & 0x7F  # exit_code, as waitpid(2) gives it
        return
    pages = int(fields[21])  # rss
    rank.resident = pages * os.sysconf("SC_PAGE_SIZE")
    for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("MemAvailable:"):
            rank.available = 1024 * int(line.split()[1])


def _rank_of(process: int) -> str:
    with contextlib.suppress(OSError):
        for setting in Path(f"/proc/{process}/environ").read_bytes().split(b"\0"):
            if setting.startswith(b"RANK="):
                return setting[5:].decode("utf-8", "replace")
    return "?"
