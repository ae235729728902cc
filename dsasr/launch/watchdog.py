"""Stop a job that hangs, and say where each rank was.

A collective that one rank never reaches keeps all others waiting. Each rank notes what it is about
to do (`Watchdog.at`), and a thread of each looks whether that has lasted too long. The first one
that finds so raises an alarm: a folder in the run folder, into which every rank's thread writes its
last note. One of them then prints all notes, and the job ends with exit code `HUNG`, for the batch
script to requeue it. A rank that is dead or stopped leaves no note, which names it.

Nothing of this needs the process group: that is what hangs. Before it is there, while ranks look
for each other, no name of this start can be agreed on, and an alarm of an earlier start of the same
run may lie about. Each rank then leaves a mark as it comes up, and believes notes that are younger.
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

from dsasr.utils.errors import UserError
from dsasr.utils.io import atomic_write

T = TypeVar("T")
HUNG = 75  # exit code: EX_TEMPFAIL of sysexits.h, "try again"
STARTING = ("start", "loading")  # what a rank does before its first turn
KEYS = 3  # of a batch's samples, how many are named


@dataclass(frozen=True)
class WatchdogConfig:
    # longest that a step, a batch of an evaluation or a checkpoint may take; 0: no limit
    seconds: float = 1800.0
    # longest that ranks may take to find each other, and then to load; 0: no limit
    start_seconds: float = 3600.0

    def __post_init__(self) -> None:
        if min(self.seconds, self.start_seconds) < 0:
            raise UserError("watchdog.seconds and watchdog.start_seconds must be at least 0")

    def limit(self, doing: str) -> float:
        """Seconds that ``doing`` may take; 0: for ever."""
        return self.start_seconds if doing in STARTING else self.seconds


@dataclass(frozen=True)
class Note:
    """What a rank last said of itself."""

    rank: int
    doing: str
    stage: str
    step: int
    keys: tuple[str, ...]
    seconds: float  # since it said so
    place: str  # file:line of ours that its main thread is in
    host: str

    def line(self) -> str:
        """For the log."""
        where = f"stage {self.stage or '–'}, step {self.step}, in {self.doing} for "
        samples = f", last samples {', '.join(self.keys)}" if self.keys else ""
        return f"rank {self.rank} on {self.host}: {where}{self.seconds:.0f} s{self.place}{samples}"


class Watchdog:
    """One rank's. ``start`` names this start of the job, the same on all ranks.

    Without it the ranks have yet to find each other (`agree`), and ``since`` tells the alarms of
    other starts apart.
    """

    def __init__(
        self,
        folder: Path,
        config: WatchdogConfig,
        rank: int,
        world: int,
        start: str | None = None,
        stop: Callable[[int], Any] = os._exit,
    ):
        self.config, self.rank, self.world = config, rank, world
        self._alarms = folder / "alarms"
        self.alarm = self._alarms / (start or "start")
        self._agreed = start is not None
        self._born = 0 if self._agreed or not config.start_seconds else self._leave_mark()
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
        """Note what comes next; between two notes may lie no more than the recipe says.

        The first note starts the watch.
        """
        _, old_stage, old_step, old_keys = self._doing
        self._doing = (doing, stage or old_stage, step or old_step, tuple(keys) or old_keys)
        self._since = time.monotonic()
        if self._thread is None and self._limited:
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()

    def agree(self, start: str) -> None:
        """The ranks have found each other: the alarm is this start's from here on."""
        self.alarm, self._agreed, self._born = self._alarms / start, True, 0

    def _leave_mark(self) -> int:
        """When this rank came up, by the clock that dates the notes; a folder in need of mending
        is not the watchdog's to tell."""
        with contextlib.suppress(OSError):
            mark = self.alarm / f"up-{self.rank:05d}"
            mark.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(mark, str(os.getpid()))
            return mark.stat().st_mtime_ns
        return 0

    def each(self, items: Iterable[T], doing: str) -> Iterator[T]:
        """``items``, with a note before each."""
        for item in items:
            self.at(doing)
            yield item

    def close(self) -> None:
        self._closed.set()

    def _watch(self) -> None:
        before = time.monotonic()
        while not self._closed.wait(self._poll):
            now = time.monotonic()
            asleep, before = now - before - self._poll, now
            if asleep > max(self._poll, 2.0):
                self._since += asleep  # the whole process was suspended: no fault of a collective
            limit = self.config.limit(self._doing[0])
            late = limit > 0 and time.monotonic() - self._since > limit
            if late or self._raised():
                # A file system that hangs as well must not keep this rank alive.
                last = threading.Timer(60.0, self._stop, (HUNG,))
                last.daemon = True
                last.start()
                with contextlib.suppress(OSError):
                    self._tell()
                last.cancel()
                if not self._closed.is_set():
                    self._stop(HUNG)
                return

    def _raised(self) -> bool:
        if self._agreed:
            return self.alarm.is_dir()
        with contextlib.suppress(OSError):
            return bool(self._fresh())
        return False

    def _fresh(self) -> list[Path]:
        """The notes of this start."""
        return [path for path in sorted(self.alarm.glob("rank-*.json")) if self._younger(path)]

    def _younger(self, path: Path) -> bool:
        return path.is_file() and path.stat().st_mtime_ns >= self._born

    def _tell(self) -> None:
        """Leave this rank's note; whoever is first prints all of them."""
        self.alarm.mkdir(parents=True, exist_ok=True)
        note = json.dumps(vars(self._note()))
        atomic_write(self.alarm / f"rank-{self.rank:05d}.json", note)
        grace = time.monotonic() + max(3 * self._poll, 1.0)
        while len(self._notes()) < self.world and time.monotonic() < grace:
            time.sleep(self._poll / 5)
        if not self._first():
            # The first to leave takes all others with it: not before all is said.
            end = time.monotonic() + 10
            while not self._younger(self.alarm / "report.txt") and time.monotonic() < end:
                time.sleep(0.05)
            return
        lines = report(self._notes(), self.world, self.config.limit(self._doing[0]))
        if not self._agreed and self.world > 1:
            where = ":".join(os.environ.get(k, "?") for k in ("MASTER_ADDR", "MASTER_PORT"))
            lines.append(f"the ranks have not met: did all start, and do they reach {where}?")
        print("\n".join(f"watchdog: {line}" for line in lines), flush=True)
        sys.stderr.flush()
        atomic_write(self.alarm / "report.txt", "\n".join(lines) + "\n")

    def _first(self) -> bool:
        """Whether it is this rank that speaks for all."""
        if not self._agreed:
            return self._notes()[0].rank == self.rank
        try:
            open(self.alarm / "teller", "x").close()
        except FileExistsError:
            return False
        return True

    def _note(self) -> Note:
        doing, stage, step, keys = self._doing
        shown = keys if len(keys) <= KEYS else (*keys[:KEYS], f"… ({len(keys)})")
        seconds = time.monotonic() - self._since
        place = _place(self._main)
        return Note(self.rank, doing, stage, step, shown, seconds, place, socket.gethostname())

    def _notes(self) -> list[Note]:
        found = []
        for path in self._fresh():
            held = json.loads(path.read_text(encoding="utf-8"))
            found.append(Note(**{**held, "keys": tuple(held["keys"])}))
        return found


def for_rank(folder: Path, config: WatchdogConfig) -> Watchdog:
    """This rank's, while no other has been heard of yet."""
    return Watchdog(
        folder,
        config,
        int(os.environ.get("RANK", "0")),
        int(os.environ.get("WORLD_SIZE", "1")),
    )


def report(notes: Sequence[Note], world: int, seconds: float) -> list[str]:
    """The alarm in lines: a head, each rank's note, and whom to suspect."""
    heard = {note.rank: note for note in notes}
    silent = [rank for rank in range(world) if rank not in heard]
    lines = [f"no progress for {seconds:g} s: the job is stopped"]
    lines += [note.line() for note in notes]
    lines += [f"rank {rank}: no word, it is dead or stopped" for rank in silent]
    places = Counter((n.doing, n.stage, n.step) for n in notes)
    suspects = silent
    if not silent and len(places) > 1:
        usual = places.most_common(1)[0][0]
        # With no majority the one that is behind holds the others up.
        if places[usual] * 2 <= len(notes):
            usual = max(places, key=lambda place: place[2])
        suspects = [n.rank for n in notes if (n.doing, n.stage, n.step) != usual]
    if suspects:
        lines.append(f"suspected: rank {', '.join(map(str, suspects))}")
    return lines


def _place(thread: int) -> str:
    """`` at file:line`` of the innermost frame of that thread that is ours."""
    frame = sys._current_frames().get(thread)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.parent.name == "dsasr" or path.parent.parent.name == "dsasr":
            return f" at {path.name}:{frame.f_lineno}"
        frame = frame.f_back
    return ""
