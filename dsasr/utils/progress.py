"""The progress bar of all commands: redrawn in place on a terminal, a line at a time in a log."""

from __future__ import annotations

import math
import sys
import time
from typing import Any

from tqdm import tqdm

SECONDS = 20.0  # between two lines of a bar in a log
WITH_TOTAL = "{l_bar}{bar}| {count} [{elapsed}<{remaining}, {speed}{postfix}]"
WITHOUT_TOTAL = "{title}{count} [{elapsed}, {speed}{postfix}]"


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

    @property
    def format_dict(self) -> dict[str, Any]:
        """tqdm's values, with ``{count}`` and ``{speed}`` in few digits for its format string.

        Unit "s" (seconds of audio) is counted as ``59:33/4:00:00``.
        """
        values = super().format_dict
        done, total, elapsed = values["n"], values["total"], values["elapsed"]
        unit = values["unit"] if values["unit_scale"] else f" {values['unit']}"
        digits = self.format_sizeof if values["unit_scale"] else _digits
        count = self.format_interval if values["unit"] == "s" else digits
        rate = values["rate"] or ((done - values["initial"]) / elapsed if elapsed else 0.0)
        speed = f"{digits(rate)}{unit}/s" if rate >= 1 else f"? {values['unit']}/s"
        if 0 < rate < 1:
            speed = f"{_digits(1 / rate)} s/{values['unit']}"
        return values | {
            "title": f"{values['prefix'].removesuffix(': ')}: " if values["prefix"] else "",
            "count": f"{count(done)}/{count(total)}" if total else f"{count(done)}{unit}",
            "speed": speed,
            "bar_format": values["bar_format"] or (WITH_TOTAL if total else WITHOUT_TOTAL),
        }

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


def _digits(value: float) -> str:
    """Three significant digits, all of a count or of a large number; thousands in groups."""
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.3g}"
