"""Stop a job that hangs, and say where each rank was.

A collective that one rank never reaches keeps all others waiting. Each rank notes what it is about
to do (`Watchdog.at`), and a thread of each looks whether that has lasted too long. The first one
that finds so raises an alarm: a folder in the run folder, into which every rank's thread writes its
last note. One of them then prints all notes, and the job ends with exit code `HUNG`, for the batch
script to requeue it. A rank that is dead or stopped leaves no note, which names it.

Nothing of this needs the process group: that is what hangs.

Before a job's ranks have met there is no folder that is theirs alone: until its first turn each
rank that waits too long says so itself (`starting`).
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

from dsasr.errors import UserError
from dsasr.files import atomic_write

T = TypeVar("T")
HUNG = 75  # exit code: EX_TEMPFAIL of sysexits.h, "try again"
KEYS = 3  # of a batch's samples, how many are named


@dataclass(frozen=True)
class WatchdogConfig:
    # The longest that one step, one batch of an evaluation or one checkpoint may take; 0: for ever.
    seconds: float = 1800.0
    # The longest from a rank's start, with its models loaded, to its first step; 0: for ever.
    start_seconds: float = 3600.0

    def __post_init__(self) -> None:
        if min(self.seconds, self.start_seconds) < 0:
            raise UserError("watchdog.seconds and watchdog.start_seconds must be at least 0")


def starting(config: WatchdogConfig, stop: Callable[[int], Any] = os._exit) -> threading.Timer:
    """A timer, to be cancelled, that ends this rank with `HUNG` when it does not get to its first
    turn: another rank has died, was never started, or cannot be reached."""
    main, rank, world = threading.get_ident(), *(os.environ.get(k, "?") for k in _OF_LAUNCHER[:2])
    meeting = ":".join(os.environ.get(k, "?") for k in _OF_LAUNCHER[2:])

    def give_up() -> None:
        where = f"rank {rank} of {world} on {socket.gethostname()}{_place(main)}"
        print(
            f"watchdog: {where}: not started after {config.start_seconds:g} s; did all ranks "
            f"start, and do they reach {meeting}?",
            flush=True,
        )
        stop(HUNG)

    timer = threading.Timer(config.start_seconds, give_up)
    timer.daemon = True
    if config.start_seconds:
        timer.start()
    return timer


_OF_LAUNCHER = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


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
    """One rank's. ``start`` names this start of the job, the same on all ranks."""

    def __init__(
        self,
        folder: Path,
        config: WatchdogConfig,
        rank: int,
        world: int,
        start: str,
        stop: Callable[[int], Any] = os._exit,
    ):
        self.config, self.rank, self.world = config, rank, world
        self.alarm = folder / "alarms" / start
        self._stop = stop
        self._main = threading.get_ident()
        self._doing: tuple[str, str, int, tuple[str, ...]] = ("start", "", 0, ())
        self._since = time.monotonic()
        self._poll = min(max(config.seconds / 20, 0.05), 10.0)
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def at(self, doing: str, stage: str = "", step: int = 0, keys: Sequence[str] = ()) -> None:
        """Note what comes next; between two notes may lie no more than ``config.seconds``.

        The first note starts the watch.
        """
        _, old_stage, old_step, old_keys = self._doing
        self._doing = (doing, stage or old_stage, step or old_step, tuple(keys) or old_keys)
        self._since = time.monotonic()
        if self._thread is None and self.config.seconds:
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()

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
            late = time.monotonic() - self._since > self.config.seconds
            if late or self.alarm.is_dir():
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

    def _tell(self) -> None:
        """Leave this rank's note; whoever is first prints all of them."""
        self.alarm.mkdir(parents=True, exist_ok=True)
        note = json.dumps(vars(self._note()))
        atomic_write(self.alarm / f"rank-{self.rank:05d}.json", note)
        grace = time.monotonic() + max(3 * self._poll, 1.0)
        while len(self._notes()) < self.world and time.monotonic() < grace:
            time.sleep(self._poll / 5)
        try:
            open(self.alarm / "teller", "x").close()
        except FileExistsError:
            # The first to leave takes all others with it: not before all is said.
            end = time.monotonic() + 10
            while not (self.alarm / "report.txt").is_file() and time.monotonic() < end:
                time.sleep(0.05)
            return
        lines = report(self._notes(), self.world, self.config.seconds)
        print("\n".join(f"watchdog: {line}" for line in lines), flush=True)
        sys.stderr.flush()
        atomic_write(self.alarm / "report.txt", "\n".join(lines) + "\n")

    def _note(self) -> Note:
        doing, stage, step, keys = self._doing
        shown = keys if len(keys) <= KEYS else (*keys[:KEYS], f"… ({len(keys)})")
        seconds = time.monotonic() - self._since
        place = _place(self._main)
        return Note(self.rank, doing, stage, step, shown, seconds, place, socket.gethostname())

    def _notes(self) -> list[Note]:
        found = []
        for path in sorted(self.alarm.glob("rank-*.json")):
            held = json.loads(path.read_text(encoding="utf-8"))
            found.append(Note(**{**held, "keys": tuple(held["keys"])}))
        return found


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
