"""The progress bar of all commands: redrawn in place on a terminal, a line at a time in a log."""

from __future__ import annotations

import math
import sys
import time
from typing import Any

from tqdm import tqdm

SECONDS = 20.0  # between two lines of a bar in a log


class Bar(tqdm):
    """tqdm's bar, on standard error unless ``file`` says otherwise.

    Where ``file`` is no terminal, each display is a line of its own: at most one every `SECONDS`,
    and one at the end (not with ``leave=False``, nor before ``delay`` seconds are over).
    """

    def __init__(self, *args: Any, file: Any = None, **options: Any):
        file = file or sys.stderr
        self._logged = not file.isatty()
        self._started = time.monotonic()
        self._due = self._started + SECONDS
        if self._logged:
            options["smoothing"] = 0  # lines are far apart: show the mean rate
        super().__init__(*args, file=file, **options)

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        if not self._logged:
            return super().display(msg, pos)
        if time.monotonic() >= self._due:
            self._write_line()
        return True

    def clear(self, nolock: bool = False) -> None:
        if not self._logged:
            super().clear(nolock)

    def close(self) -> None:
        if getattr(self, "_logged", False) and not getattr(self, "disable", True):
            if self.leave is not False and time.monotonic() >= self._started + self.delay:
                self._write_line()
            self.delay = math.inf  # as if never displayed: tqdm has nothing to clear
        super().close()

    def _write_line(self) -> None:
        self._due = time.monotonic() + SECONDS
        self.fp.write(f"{self}\n")
        self.fp.flush()
