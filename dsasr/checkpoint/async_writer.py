"""Write a folder of fragments in the background while training goes on.

`AsyncFolderWriter` copies the fragments to host memory, which is all that the training loop waits
for, and leaves the rest to a thread on each rank. The threads make no collective call, so none can
come between those of the loop: each rank's thread leaves a note beside its file, and rank 0's
publishes the folder when all notes are there. `AsyncFolderWriter.wait` raises what went wrong.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dsasr.checkpoint import tensor_fragments
from dsasr.checkpoint.manifest import manifest_of
from dsasr.checkpoint.tensor_fragments import Fragment
from dsasr.utils import distributed
from dsasr.utils.io import atomic_write, staging_folder


class AsyncFolderWriter:
    """A folder of all ranks' ``fragments`` on its way to ``target``; the constructor is collective.

    ``info`` goes into the manifest. Raises `OSError` on all ranks where the staging folder cannot
    be created.
    """

    def __init__(self, target: Path, fragments: Mapping[str, Fragment], info: Mapping[str, Any]):
        self.target = target
        self.failure: str | None = None  # this rank's; on rank 0, once published, any rank's
        self.seconds = 0.0  # that writing took
        self._staging = staging_folder(target)
        self._rank, self._world_size = distributed.rank(), distributed.world_size()
        self._info = json.dumps(info)  # at once: the caller may change it
        self._written, self._stop = threading.Event(), threading.Event()
        self._started = time.monotonic()
        try:
            distributed.on_main_rank(self._create_staging)
        except OSError as error:
            raise OSError(f"could not write {target}: {error}") from None
        self._fragments = {
            key: dataclasses.replace(f, tensor=f.tensor.detach().to("cpu", copy=True))
            for key, f in fragments.items()
        }
        self._thread = threading.Thread(target=self._work, name="checkpoint", daemon=True)
        self._thread.start()

    def _create_staging(self) -> None:
        shutil.rmtree(self._staging, ignore_errors=True)
        self._staging.mkdir(parents=True)

    @property
    def done(self) -> bool:
        """Whether this rank's thread has ended; rank 0's ends when all is published, or failed."""
        return not self._thread.is_alive()

    def wait(self) -> None:
        """Block until the folder is published; collective.

        When any rank cannot write, `OSError` with the first such rank's reason is raised on all.
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
        """Give the threads ``seconds`` to finish, without a collective call: for a rank's end."""
        self._thread.join(seconds)
        self._stop.set()

    def _work(self) -> None:
        name = tensor_fragments.rank_file(self._rank)
        note: dict[str, Any] = {"name": name}
        try:
            note["sha256"] = tensor_fragments.write_file(self._staging / name, self._fragments)
        except OSError as error:
            self.failure = note["failure"] = f"rank {self._rank}: {error}"
        self._fragments = {}
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
        """Publish the folder when all ranks have written; returns the reason if one has failed."""
        pause, missing = 0.005, range(self._world_size)
        while missing := [r for r in missing if not self._note(r).is_file()]:
            if self._stop.wait(pause):
                return self.failure or f"rank {missing[0]} did not finish"
            pause = min(pause * 1.5, 0.5)
        notes = [json.loads(self._note(r).read_text("utf-8")) for r in range(self._world_size)]
        for note in notes:
            if "failure" in note:
                return note["failure"]
        for rank in range(self._world_size):
            self._note(rank).unlink()
        files = {note["name"]: note["sha256"] for note in notes}
        manifest = manifest_of(json.loads(self._info), files)
        tensor_fragments.publish(self._staging, self.target, manifest)
        return None
