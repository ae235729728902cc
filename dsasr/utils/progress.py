"""The one progress bar: redrawn in place on a terminal, a line now and then in a log."""

from __future__ import annotations

import math
import sys
import time
from typing import Any

from tqdm import tqdm

SECONDS = 20.0  # between two lines of a bar in a log


class Bar(tqdm):
    """tqdm, on standard error unless ``file`` says otherwise.

    Where that is no terminal, each look is a line of its own: at most one every `SECONDS`, and one
    at the end (not with ``leave=False``, nor before ``delay`` seconds are over).
    """

    def __init__(self, *given: Any, file: Any = None, **named: Any):
        file = file or sys.stderr
        self._logged = not file.isatty()
        self._began = time.monotonic()
        self._due = self._began + SECONDS
        if self._logged:
            named["smoothing"] = 0  # the rate of the whole, as lines are far apart
        super().__init__(*given, file=file, **named)

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        if not self._logged:
            return super().display(msg, pos)
        if time.monotonic() >= self._due:
            self._line()
        return True

    def clear(self, nolock: bool = False) -> None:
        if not self._logged:
            super().clear(nolock)

    def close(self) -> None:
        if getattr(self, "_logged", False) and not getattr(self, "disable", True):
            if self.leave is not False and time.monotonic() >= self._began + self.delay:
                self._line()
            self.delay = math.inf  # as if never shown: nothing is left to be cleared
        super().close()

    def _line(self) -> None:
        self._due = time.monotonic() + SECONDS
        self.fp.write(f"{self}\n")
        self.fp.flush()
