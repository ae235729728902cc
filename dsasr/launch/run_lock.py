"""One job at a time in a run folder: its lock, and ``dsasr stop``.

``lock.json`` says who trains here. It is created exclusively, which is atomic on NFS too; ``flock``
is not relied on. A beat in a file beside it changes every few seconds for as long as the job lives.
A lock whose process has ended on this machine is void at once; one from elsewhere is void when its
beat has not changed for `STALE` seconds of the observer's own clock, so no clocks are compared. A
job that finds its lock taken over (it was suspended, or cut off from the file system) ends without
saving: the run is another's.

``dsasr stop`` leaves ``stop.json`` beside the lock; the job's beating thread sees it.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dsasr.launch.stop_request import StopRequest
from dsasr.utils.errors import UserError
from dsasr.utils.io import atomic_write

LOCK, STOP = "lock.json", "stop.json"
SLURM_START = "DSASR_START"  # variable: "JOB.START" of a Slurm job, set by slurm/job.sh
BEAT = 10.0  # seconds between two beats
STALE = 120.0  # without a new beat; NFS may show a file as it was a minute ago
POLL = 1.0
SAVING = 1800.0  # longest that a new job waits for one that saves and stops
LOST = 2  # exit code of a job whose lock was taken over; Slurm jobs are not requeued for it


@dataclass(frozen=True)
class Owner:
    """A process that holds a lock."""

    token: str  # of this start
    host: str
    pid: int
    started: str  # UTC
    job: str  # Slurm's id; empty: no Slurm job
    machine: str  # id of the boot and of the space of process ids; empty: unknown
    pid_started: str  # in ticks since the boot: another process may get the id later

    @classmethod
    def this_process(cls) -> Owner:
        started = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
        job = os.environ.get(SLURM_START, "").split(".")[0] or os.environ.get("SLURM_JOB_ID", "")
        return cls(
            uuid.uuid4().hex, socket.gethostname(), os.getpid(), started, job, _machine(),
            _pid_started(os.getpid()),
        )  # fmt: skip

    @classmethod
    def read(cls, folder: Path) -> Owner | None:
        """The holder of the folder's lock; None: nobody. One that is unreadable has no token."""
        try:
            content = (folder / LOCK).read_bytes()
        except FileNotFoundError:
            return None
        try:
            return cls(**json.loads(content))
        except (ValueError, TypeError):  # being written just now, or torn
            return cls("", "", 0, "", "", "", "")

    @property
    def lives(self) -> bool | None:
        """Whether its process runs; None: it cannot be known from this machine."""
        if not self.machine or self.machine != _machine():
            return None
        return _pid_started(self.pid) == self.pid_started

    def __str__(self) -> str:
        if not self.token:
            return "a job whose lock is torn"
        job = f"Slurm job {self.job}, " if self.job else ""
        return f"{job}process {self.pid} on {self.host} since {self.started}"


def hold(folder: Path, request: StopRequest) -> RunLock | None:
    """Take the lock of a run folder; the lock on rank 0, None on others. Collective.

    Raises `UserError` on all ranks where another job holds it, or the folder cannot be written.
    """
    from dsasr.utils import distributed  # imports torch, which `dsasr stop` does without

    lock, problem = None, ""
    if distributed.is_main_rank():
        try:
            lock = RunLock(folder, request)
        except UserError as error:
            problem = str(error)
        except OSError as error:
            problem = f"{folder} cannot be written: {error}"
    problem = distributed.broadcast(problem)
    if problem:
        raise UserError(problem)
    return lock


class RunLock:
    """The lock of ``folder``, held by this process from its construction until `release`.

    ``lost`` is called with an exit code when another job has taken it over.
    """

    def __init__(self, folder: Path, request: StopRequest, lost: Callable[[int], Any] = os._exit):
        self.folder, self.owner = folder, Owner.this_process()
        self._request, self._lost = request, lost
        self._beats, self._next_beat, self._told = 0, 0.0, False
        self._released = threading.Event()
        folder.mkdir(parents=True, exist_ok=True)
        try:
            self._acquire()
        except BaseException:
            self._beat_path(self.owner).unlink(missing_ok=True)
            raise
        with contextlib.suppress(OSError):
            (folder / STOP).unlink(missing_ok=True)  # meant for an earlier job
        self._thread = threading.Thread(target=self._watch, name="run_lock", daemon=True)
        self._thread.start()

    # -- taking it ---------------------------------------------------------------------------

    def _acquire(self) -> None:
        while not _create(self.folder / LOCK, self._text()):
            holder = Owner.read(self.folder)
            if holder is not None and self._is_void(holder) and self._take_over(holder):
                return

    def _text(self) -> str:
        return json.dumps(asdict(self.owner))

    def _is_void(self, holder: Owner) -> bool:
        """Whether ``holder`` has ended; False: its lock is gone or has changed hands.

        Waits for a sign of life where the holder is elsewhere, and for its end where it is
        stopping. Raises `UserError` where it lives.
        """
        began = since = time.monotonic()
        seen, reported = self._beat_of(holder), False
        while Owner.read(self.folder) == holder:
            beat, now, lives = self._beat_of(holder), time.monotonic(), holder.lives
            if lives is False or (lives is None and now - since > STALE):
                return True
            stopping = beat.startswith("stopping") and now - began < SAVING
            if not stopping and (lives or beat != seen):
                raise UserError(in_use(self.folder, holder))
            if beat != seen:
                seen, since = beat, now
            if not reported:
                reported = True
                does = "is stopping" if stopping else f"may be gone, {STALE:g} s will tell"
                print(f"{self.folder} is trained by {holder}, which {does}: waiting", flush=True)
            # A change of the folder by this machine has an NFS client look again.
            with contextlib.suppress(OSError):
                atomic_write(self._beat_path(self.owner), "waiting")
            time.sleep(POLL)
        return False

    def _take_over(self, holder: Owner) -> bool:
        """Replace the lock of ``holder``, which has ended; False where another job does so."""
        marker = self.folder / f".lock.{holder.token or 'torn'}.taken"
        if not _create(marker, self.owner.token):
            began = time.monotonic()
            while marker.exists() and Owner.read(self.folder) == holder:
                if time.monotonic() - began > STALE:  # the job that made it was killed meanwhile
                    marker.unlink(missing_ok=True)
                time.sleep(POLL)
            return False
        try:
            if Owner.read(self.folder) != holder:
                return False
            atomic_write(self.folder / LOCK, self._text())
        finally:
            marker.unlink(missing_ok=True)
        self._beat_path(holder).unlink(missing_ok=True)
        return True

    # -- holding it --------------------------------------------------------------------------

    def _beat_path(self, owner: Owner) -> Path:
        return beat_path(self.folder, owner)

    def _beat_of(self, owner: Owner) -> str:
        try:
            return self._beat_path(owner).read_text(encoding="utf-8")
        except OSError:
            return ""

    def _watch(self) -> None:
        while not self._released.wait(POLL):
            with contextlib.suppress(OSError):  # the file system may be away for a while
                if _stop_token(self.folder) == self.owner.token:
                    self._request.record("dsasr stop")
                self._beat()

    def _beat(self) -> None:
        """Change the beat where it is due; find out whether the lock is still this job's."""
        stopping, now = bool(self._request.cause), time.monotonic()
        if now < self._next_beat and stopping == self._told:
            return
        self._next_beat, self._told = now + BEAT, stopping
        holder = Owner.read(self.folder)
        if holder is None:  # removed by hand
            _create(self.folder / LOCK, self._text())
            holder = Owner.read(self.folder)
        if holder is not None and holder.token not in ("", self.owner.token):
            print(
                f"error: {self.folder} was taken over by {holder}: this job ends without saving",
                file=sys.stderr, flush=True,
            )  # fmt: skip
            self._lost(LOST)
            return
        self._beats += 1
        beat = f"stopping {self._beats}" if stopping else f"{self._beats}"
        # By rename: a changed folder has an NFS client look for a stop.json again.
        atomic_write(self._beat_path(self.owner), beat)

    def release(self) -> None:
        self._released.set()
        self._thread.join()
        with contextlib.suppress(OSError):
            if Owner.read(self.folder) == self.owner:
                if _stop_token(self.folder) == self.owner.token:
                    (self.folder / STOP).unlink(missing_ok=True)
                (self.folder / LOCK).unlink(missing_ok=True)
            self._beat_path(self.owner).unlink(missing_ok=True)


def beat_path(folder: Path, owner: Owner) -> Path:
    """The file that ``owner`` changes every `BEAT` seconds for as long as it holds the lock; it
    begins with "stopping" where the job has been asked to stop."""
    return folder / f".lock.{owner.token}.beat"


def in_use(folder: Path, holder: Owner) -> str:
    """The line for a user whose job may not train in ``folder``."""
    if not holder.token:
        return f"{folder / LOCK} is torn: delete it if nothing trains there"
    return (
        f"{folder} is trained by {holder}: wait for its end, stop it with `dsasr stop {folder}`, "
        "or give run=FOLDER for another run"
    )


def ask_to_stop(folder: Path) -> Owner | None:
    """Ask the job that trains in ``folder`` to save and stop; None where none does."""
    holder = Owner.read(folder)
    if holder is None or holder.lives is False:
        return None
    atomic_write(folder / STOP, json.dumps({"token": holder.token, "job": holder.job}))
    return holder


def _stop_token(folder: Path) -> str:
    """The token of the holder that is to stop; empty: none."""
    try:
        return json.loads((folder / STOP).read_text(encoding="utf-8"))["token"]
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _create(path: Path, text: str) -> bool:
    """Write a file that must not exist; False where it does."""
    try:
        handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:
        return False
    with open(handle, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(handle)
    return True


def _machine() -> str:
    """An id of this machine since its boot, and of its space of process ids (a container's)."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _pid_started(process: int) -> str:
    """When a process of this machine started; empty where it has ended."""
    try:
        stat = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    state, *fields = stat.rpartition(")")[2].split()
    return "" if state in "ZX" else fields[18]
