"""A folder of fragments written while training goes on.

`AsyncFolderWriter` copies what is to be written, which is all that the loop waits for, and leaves
the rest to a thread of each rank. The threads need no collective, so they cannot come between the
loop's: a rank's thread leaves a note beside its file, and rank 0's publishes the folder when all
notes are there. What can fail is told by `wait`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dsasr.checkpoint import tensor_fragments
from dsasr.checkpoint.tensor_fragments import Fragment
from dsasr.utils import distributed
from dsasr.utils.io import atomic_write


class AsyncFolderWriter:
    """``held`` of all ranks on its way to ``target``. Making one is collective."""

    def __init__(self, target: Path, held: Mapping[str, Fragment], info: Mapping[str, Any]):
        self.target = target
        self.failure: str | None = None  # of this rank; on rank 0, once published, of all
        self.seconds = 0.0  # that writing took
        self._staging = tensor_fragments.staging_of(target)
        self._rank, self._world = distributed.rank(), distributed.world_size()
        self._info = json.dumps(info)  # now: the caller's may change
        self._written, self._stop = threading.Event(), threading.Event()
        self._started = time.monotonic()
        problem = None
        if distributed.is_main_rank():
            try:
                shutil.rmtree(self._staging, ignore_errors=True)
                self._staging.mkdir(parents=True)
            except OSError as error:
                problem = str(error)
        problem = distributed.broadcast(problem)
        if problem:
            raise OSError(f"could not write {target}: {problem}")
        self._held = {
            key: dataclasses.replace(f, tensor=f.tensor.detach().to("cpu", copy=True))
            for key, f in held.items()
        }
        self._thread = threading.Thread(target=self._work, name="checkpoint", daemon=True)
        self._thread.start()

    @property
    def over(self) -> bool:
        """Whether this rank's thread has ended; on rank 0: whether the folder is there, or not."""
        return not self._thread.is_alive()

    def wait(self) -> None:
        """Until the folder is published; collective.

        Raises `OSError` on every rank, with the first rank's reason, when any could not write.
        """
        self._written.wait()
        failures = [f for f in distributed.all_gather_object(self.failure) if f]
        if failures:
            self._stop.set()
        self._thread.join()
        failure = distributed.broadcast(failures[0] if failures else self.failure)
        if failure:
            raise OSError(f"could not write {self.target}: {failure}")

    def wait_alone(self, seconds: float) -> None:
        """At a rank's end: give the threads so long to come through, without a collective."""
        self._thread.join(seconds)
        self._stop.set()

    def _work(self) -> None:
        name = f"rank-{self._rank:05d}.safetensors"
        note: dict[str, Any] = {"name": name}
        try:
            note["sha256"] = tensor_fragments.write_file(self._staging / name, self._held)
        except OSError as error:
            self.failure = note["failure"] = f"rank {self._rank}: {error}"
        self._held = {}
        try:
            atomic_write(self._note(self._rank), json.dumps(note))
        except OSError as error:
            self.failure = self.failure or f"rank {self._rank}: {error}"
        self._written.set()
        if self._rank == 0:
            try:
                self.failure = self._publish()
            except (OSError, ValueError) as error:
                self.failure = str(error)
            if self.failure:
                shutil.rmtree(self._staging, ignore_errors=True)
        self.seconds = time.monotonic() - self._started

    def _note(self, rank: int) -> Path:
        return self._staging / f"rank-{rank:05d}.note"

    def _publish(self) -> str | None:
        """Rename the folder when all ranks have written; or why not."""
        pause, missing = 0.005, range(self._world)
        while missing := [r for r in missing if not self._note(r).is_file()]:
            if self._stop.wait(pause):
                return self.failure or f"rank {missing[0]} did not finish"
            pause = min(pause * 1.5, 0.5)
        notes = [json.loads(self._note(r).read_text("utf-8")) for r in range(self._world)]
        for note in notes:
            if "failure" in note:
                return note["failure"]
        for rank in range(self._world):
            self._note(rank).unlink()
        files = {note["name"]: note["sha256"] for note in notes}
        manifest = {"format": tensor_fragments.FORMAT, **json.loads(self._info), "files": files}
        atomic_write(self._staging / tensor_fragments.MANIFEST, json.dumps(manifest, indent=1))
        tensor_fragments.replace_folder(self._staging, self.target)
        return None


def remove_remains(folder: Path) -> None:
    """What killed jobs left half-written or half-removed in ``folder``."""
    for path in folder.glob(".*.tmp"):
        with contextlib.suppress(OSError):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
