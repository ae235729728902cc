"""Whether a rank was asked to save and stop, and what keeps it alive until it has.

A signal, ``dsasr stop``, the end of the launcher and a closed output all ask for the same: the run
saves a checkpoint before its next step, and ends. `distributed.DelayedAnyRank` tells all ranks.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from typing import Any, TextIO

EARLY = (signal.SIGUSR1,)  # while a rank loads: it stops before its first step
# While a rank trains. Before, there is nothing to save, and SIGINT and SIGTERM end it at once.
TRAINING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """The first cause to stop that a rank has met; later ones change nothing.

    A rank is sent several signals where one was meant: Ctrl-C reaches it and its launcher, which
    passes on another. None of them may disturb a rank that saves.
    """

    def __init__(self) -> None:
        self.cause = ""  # such as SIGTERM; empty: none
        self.training = False  # whether there may be something to save
        self.saving = False  # whether all ranks have agreed to stop

    def record(self, cause: str) -> None:
        """A request to stop for ``cause``."""
        self.cause = self.cause or cause

    def listen(self, *numbers: int) -> None:
        """Take these signals of the process as requests; for the main thread."""
        if threading.current_thread() is threading.main_thread():
            for number in numbers:
                signal.signal(number, self._on_signal)

    def begin_training(self) -> None:
        """From here on a rank that is asked to stop has something to save."""
        self.listen(*TRAINING)
        self.training = True

    def _on_signal(self, number: int, _frame: Any) -> None:
        self.record(signal.Signals(number).name)

    @contextlib.contextmanager
    def guard_output(self):
        """While this is open, a closed stdout or stderr is a request, not an error in `print`.

        What reads a rank's output (a launcher, ``tee``) may end by the signal that the rank got.
        """
        before = sys.stdout, sys.stderr
        sys.stdout, sys.stderr = (_GuardedOutput(stream, self) for stream in before)
        try:
            yield
        finally:
            sys.stdout, sys.stderr = before


class _GuardedOutput:
    """A text stream whose reader may go away."""

    def __init__(self, stream: TextIO, request: StopRequest):
        self._stream, self._request = stream, request

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except BrokenPipeError:
            self._replace()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except BrokenPipeError:
            self._replace()

    def _replace(self) -> None:
        """Have the stream's file descriptor write nowhere."""
        self._request.record("the end of what read its output")
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
