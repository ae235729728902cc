"""Stop a job that hangs, and report where each rank was.

A collective that one rank never reaches keeps all others waiting. Each rank records what it is
about to do (`Watchdog.at`), and a thread on each checks whether that takes too long. The first
thread to find so raises an alarm: it creates a folder in the run folder, into which the thread of
every rank writes that rank's last record as a note. One of them prints all notes, and the job ends
with exit code `HUNG`, so that the batch script requeues it. A rank that is dead or stopped is
suspected, because it leaves no note.

None of this needs the process group, which is what hangs. Before it exists, while the ranks look
for each other, they cannot agree on a name for this start of the job, and the alarm of an earlier
start may still be in the run folder. Each rank then writes a mark when it starts, and ignores notes
that are older than its mark.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from dsasr.utils import ranges
from dsasr.utils.io import atomic_write
from dsasr.utils.ranges import NonNegativeFloat
from dsasr.utils.troubleshooting import see

T = TypeVar("T")
HUNG = 75  # exit code: EX_TEMPFAIL of sysexits.h, "try again"
STARTING = ("start", "loading")  # the activities before the first step
KEYS = 3  # samples of a batch that a note names


@dataclass(frozen=True)
class WatchdogConfig:
    # longest that a step, a batch of an evaluation or a checkpoint may take; 0: no limit
    seconds: NonNegativeFloat = 1800.0
    # longest that ranks may take to find each other, and then to load; 0: no limit
    start_seconds: NonNegativeFloat = 3600.0

    def __post_init__(self) -> None:
        ranges.check(self)

    def limit(self, doing: str) -> float:
        """The limit of the activity ``doing`` in seconds; 0: none."""
        return self.start_seconds if doing in STARTING else self.seconds


@dataclass(frozen=True)
class Note:
    """A rank's last record of what it was doing."""

    rank: int
    doing: str
    stage: str
    step: int
    keys: tuple[str, ...]
    seconds: float  # since then
    location: str  # `` at file:line`` of this package that its main thread is in
    host: str

    def line(self) -> str:
        """The note as a line of the log."""
        step = f"stage {self.stage or '–'}, step {self.step}"
        activity = f"in {self.doing} for {self.seconds:.0f} s{self.location}"
        samples = f", last samples {', '.join(self.keys)}" if self.keys else ""
        return f"rank {self.rank} on {self.host}: {step}, {activity}{samples}"


class Watchdog:
    """The watchdog of one rank. ``start``: the name of this start of the job, equal on all ranks.

    Without it the ranks have not found each other yet (`set_start`). ``stop`` ends the process with
    an exit code.
    """

    def __init__(
        self,
        folder: Path,
        config: WatchdogConfig,
        rank: int,
        world_size: int,
        start: str | None = None,
        stop: Callable[[int], Any] = os._exit,
    ):
        self.config, self.rank, self.world_size = config, rank, world_size
        self._alarms = folder / "alarms"
        self.alarm = self._alarms / (start or "start")
        self._start_known = start is not None
        self._mark_time = 0 if self._start_known or not config.start_seconds else self._write_mark()
        self._stop = stop
        self._main = threading.get_ident()
        self._doing: tuple[str, str, int, tuple[str, ...]] = ("start", "", 0, ())
        self._since = time.monotonic()
        limits = [s for s in (config.seconds, config.start_seconds) if s]
        self._poll = min(max(min(limits, default=0.0) / 20, 0.05), 10.0)
        self._limited = bool(limits)
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def at(self, doing: str, stage: str = "", step: int = 0, keys: Sequence[str] = ()) -> None:
        """Record what this rank is about to do: the activity, stage, step and samples' keys.

        What is not given stays as it was. The recipe limits the time until the next record. The
        first record starts the watching thread.
        """
        _, last_stage, last_step, last_keys = self._doing
        self._doing = (doing, stage or last_stage, step or last_step, tuple(keys) or last_keys)
        self._since = time.monotonic()
        if self._thread is None and self._limited:
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()

    def set_start(self, start: str) -> None:
        """Name this start of the job: the ranks have found each other and share the name."""
        self.alarm, self._start_known, self._mark_time = self._alarms / start, True, 0

    def _write_mark(self) -> int:
        """Write this rank's mark; returns its time by the file system's clock, in nanoseconds.

        0 for a folder that cannot be written, which other parts of the run report.
        """
        with contextlib.suppress(OSError):
            mark = self.alarm / f"up-{self.rank:05d}"
            mark.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(mark, str(os.getpid()))
            return mark.stat().st_mtime_ns
        return 0

    def each(self, items: Iterable[T], doing: str) -> Iterator[T]:
        """``items``, with the activity ``doing`` recorded before each."""
        for item in items:
            self.at(doing)
            yield item

    def close(self) -> None:
        self._closed.set()

    def _watch(self) -> None:
        last = time.monotonic()
        while not self._closed.wait(self._poll):
            now = time.monotonic()
            suspended, last = now - last - self._poll, now
            if suspended > max(self._poll, 2.0):
                self._since += suspended  # the whole process was suspended, and nothing hangs
            limit = self.config.limit(self._doing[0])
            late = limit > 0 and time.monotonic() - self._since > limit
            if late or self._alarm_raised():
                # A file system that hangs too must not keep this rank alive.
                timer = threading.Timer(60.0, self._stop, (HUNG,))
                timer.daemon = True
                timer.start()
                with contextlib.suppress(OSError):
                    self._report()
                timer.cancel()
                if not self._closed.is_set():
                    self._stop(HUNG)
                return

    def _alarm_raised(self) -> bool:
        if self._start_known:
            return self.alarm.is_dir()
        with contextlib.suppress(OSError):
            return bool(self._note_files())
        return False

    def _note_files(self) -> list[Path]:
        """The notes of this start of the job."""
        return [path for path in sorted(self.alarm.glob("rank-*.json")) if self._is_new(path)]

    def _is_new(self, path: Path) -> bool:
        return path.is_file() and path.stat().st_mtime_ns >= self._mark_time

    def _report(self) -> None:
        """Write this rank's note; one rank prints the notes of all."""
        self.alarm.mkdir(parents=True, exist_ok=True)
        note = json.dumps(vars(self._note()))
        atomic_write(self.alarm / f"rank-{self.rank:05d}.json", note)
        deadline = time.monotonic() + max(3 * self._poll, 1.0)
        while len(self._notes()) < self.world_size and time.monotonic() < deadline:
            time.sleep(self._poll / 5)
        if not self._is_reporter():
            # The launcher ends all ranks with the first that exits: wait for the report.
            end = time.monotonic() + 10
            while not self._is_new(self.alarm / "report.txt") and time.monotonic() < end:
                time.sleep(0.05)
            return
        lines = report(self._notes(), self.world_size, self.config.limit(self._doing[0]))
        if not self._start_known and self.world_size > 1:
            address = ":".join(os.environ.get(k, "?") for k in ("MASTER_ADDR", "MASTER_PORT"))
            lines.append(f"the ranks have not met: did all start, and do they reach {address}?")
        print("\n".join(f"watchdog: {line}" for line in lines), flush=True)
        sys.stderr.flush()
        atomic_write(self.alarm / "report.txt", "\n".join(lines) + "\n")

    def _is_reporter(self) -> bool:
        """Whether this rank prints the report."""
        if not self._start_known:
            return self._notes()[0].rank == self.rank
        try:
            open(self.alarm / "reporter", "x").close()
        except FileExistsError:
            return False
        return True

    def _note(self) -> Note:
        doing, stage, step, keys = self._doing
        shown = keys if len(keys) <= KEYS else (*keys[:KEYS], f"… ({len(keys)})")
        seconds = time.monotonic() - self._since
        location = _location(self._main)
        return Note(self.rank, doing, stage, step, shown, seconds, location, socket.gethostname())

    def _notes(self) -> list[Note]:
        notes = []
        for path in self._note_files():
            fields = json.loads(path.read_text(encoding="utf-8"))
            notes.append(Note(**{**fields, "keys": tuple(fields["keys"])}))
        return notes


def for_rank(folder: Path, config: WatchdogConfig) -> Watchdog:
    """The watchdog of this rank, by the launcher's variables, before the ranks find each other."""
    return Watchdog(
        folder,
        config,
        int(os.environ.get("RANK", "0")),
        int(os.environ.get("WORLD_SIZE", "1")),
    )


def report(notes: Sequence[Note], world_size: int, seconds: float) -> list[str]:
    """The lines of an alarm's report: a heading, each rank's note, and the suspected ranks."""
    reported = {note.rank for note in notes}
    silent = [rank for rank in range(world_size) if rank not in reported]
    lines = [f"no progress for {seconds:g} s: the job is stopped{see('hangs')}"]
    lines += [note.line() for note in notes]
    lines += [f"rank {rank}: no word, it is dead or stopped" for rank in silent]
    activities = Counter((n.doing, n.stage, n.step) for n in notes)
    suspects = silent
    if not silent and len(activities) > 1:
        usual = activities.most_common(1)[0][0]
        # Without a majority the rank at an earlier step keeps the others waiting.
        if activities[usual] * 2 <= len(notes):
            usual = max(activities, key=lambda activity: activity[2])
        suspects = [n.rank for n in notes if (n.doing, n.stage, n.step) != usual]
    if suspects:
        lines.append(f"suspected: rank {', '.join(map(str, suspects))}")
    return lines


def _location(thread: int) -> str:
    """`` at file:line`` of the innermost frame of that thread which is in this package."""
    frame = sys._current_frames().get(thread)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if "dsasr" in (parent.name for parent in list(path.parents)[:3]):
            return f" at {path.name}:{frame.f_lineno}"
        frame = frame.f_back
    return ""
