"""Uploaded files that wait to be transcribed, those of several clients together.

Short files share batches; each long one is a job of its own beside them, so that no client waits
for another's long file. The recognizer takes the files from the queue while it fills a batch.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path

from dsasr.inference.recognizer import Recognizer, Transcription
from dsasr.server.metrics import Metrics
from dsasr.server.settings import ClientError
from dsasr.utils.errors import UserError

SHORT = 60.0  # seconds of audio
TOGETHER = 32  # short files in a batch, at most

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """A file to transcribe, and where the result goes."""

    path: Path
    seconds: float
    language: str = ""
    result: Future[Transcription] = field(default_factory=Future)


class FileQueue:
    """Two threads that transcribe: short files, and long ones."""

    def __init__(self, recognizer: Recognizer, limit: int, metrics: Metrics):
        self._recognizer, self._limit, self._metrics = recognizer, limit, metrics
        self._queues: dict[bool, queue.SimpleQueue[Job]] = {
            short: queue.SimpleQueue() for short in (True, False)
        }
        self._waiting, self._lock = 0, threading.Lock()
        self._threads = [
            threading.Thread(target=self._run, args=(short,), name=name, daemon=True)
            for short, name in ((True, "short files"), (False, "long files"))
        ]
        for thread in self._threads:
            thread.start()

    @property
    def alive(self) -> bool:
        return all(thread.is_alive() for thread in self._threads)

    def reserve(self) -> None:
        """A place in the queue, before a file is read. Raises `ClientError` 429 if it is full."""
        with self._lock:
            if self._waiting >= self._limit:
                raise ClientError(
                    429, "queue_full",
                    f"{self._limit} files are waiting already: try again in some seconds",
                )  # fmt: skip
            self._waiting += 1
            self._metrics.waiting.set(self._waiting)

    def release(self) -> None:
        """Give the place back."""
        with self._lock:
            self._waiting -= 1
            self._metrics.waiting.set(self._waiting)

    def submit(self, job: Job) -> None:
        self._queues[job.seconds <= SHORT].put(job)

    def _run(self, short: bool) -> None:
        while True:
            first = self._queues[short].get()
            jobs: dict[str, Job] = {}
            try:
                self._transcribe(self._taken(first, short, jobs), jobs)
            except Exception:  # of the model or a decoder; the queue goes on
                log.exception("a batch of files failed")
            self._metrics.file_batch.observe(max(len(jobs), 1))
            for job in jobs.values():
                if not job.result.done():  # one by one: only the file at fault fails
                    self._alone(job)

    def _taken(self, first: Job, short: bool, jobs: dict[str, Job]) -> Iterator[Path]:
        """The paths of a batch's files, as the recognizer takes them."""
        job: Job | None = first
        while job is not None:
            if not job.result.cancelled():
                jobs[str(job.path)] = job
                yield job.path
            job = None
            if short and len(jobs) < TOGETHER:
                try:
                    job = self._queues[short].get_nowait()
                except queue.Empty:
                    job = None

    def _transcribe(self, paths: Iterator[Path], jobs: dict[str, Job]) -> None:
        def refuse(path: str, error: UserError) -> None:
            _finish(jobs[path], error=_unreadable(jobs[path], error))

        def language(path: str) -> str:
            return jobs[path].language

        for transcription in self._recognizer.transcribe_all(paths, on_error=refuse, lang=language):
            job = jobs[transcription.path]
            self._metrics.audio_seconds.labels("file").inc(job.seconds)
            _finish(job, transcription)

    def _alone(self, job: Job) -> None:
        try:
            self._transcribe(iter([job.path]), {str(job.path): job})
        except Exception as error:  # the request that waits for the file raises it
            log.exception("a file failed")
            _finish(job, error=error)
        if not job.result.done():
            _finish(job, error=RuntimeError("the file gave no result"))


def _finish(
    job: Job, transcription: Transcription | None = None, error: Exception | None = None
) -> None:
    if job.result.set_running_or_notify_cancel() if not job.result.done() else False:
        if error is not None:
            job.result.set_exception(error)
        else:
            job.result.set_result(transcription)


def _unreadable(job: Job, error: UserError) -> ClientError:
    """Without the name that the upload has on this machine."""
    reason = str(error).replace(str(job.path), "the file")
    return ClientError(400, "bad_audio", reason)
