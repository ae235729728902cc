"""A JSON-lines log that another process appends to, followed without reading it anew."""

from __future__ import annotations

import json
import os
from pathlib import Path

from dsasr.tracking.run_log import Row

CHUNK = 16 << 20  # bytes read at once
MAX_LINE = 64 << 20  # bytes; what has no line end for so long is no log


class GrowingLog:
    """The rows of a log so far; `refresh` adds those written since.

    Only whole lines count: the torn last one of a running job is read when it is complete. Lines
    that are no JSON objects are skipped and counted in ``broken``. A log that was replaced (a
    resumed run cuts it back) is read from its start. A missing one keeps its rows.
    """

    def __init__(self, path: Path):
        self.path = path
        self.problem = ""  # why the last `refresh` could not read; empty: it could
        self._clear((0, 0))

    def _clear(self, file: tuple[int, int]) -> None:
        self.rows: list[Row] = []
        self.broken = 0
        self._file, self._offset = file, 0

    def refresh(self) -> bool:
        """Whether there are other rows than before."""
        before, count = self._file, len(self.rows)
        self.problem = ""
        try:
            with open(self.path, "rb") as file:
                stat = os.fstat(file.fileno())
                if (stat.st_dev, stat.st_ino) != self._file or stat.st_size < self._offset:
                    self._clear((stat.st_dev, stat.st_ino))
                file.seek(self._offset)
                rest = b""
                while data := file.read(CHUNK):
                    *lines, rest = (rest + data).split(b"\n")
                    self._offset += sum(len(line) + 1 for line in lines)
                    for line in lines:
                        self._add(line)
                    if len(rest) > MAX_LINE:
                        self.problem = f"{self.path} is no log: a line has over {MAX_LINE:,} bytes"
                        break
        except OSError as error:
            self.problem = f"{self.path}: {error.strerror or error}"
        return self._file != before or len(self.rows) != count

    def _add(self, line: bytes) -> None:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict):
            self.rows.append(row)
        else:
            self.broken += 1
