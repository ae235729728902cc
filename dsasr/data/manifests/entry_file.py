"""Utterances in a file instead of in memory, for corpora of millions of them."""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np

from dsasr.data.manifests.entry import ManifestEntry


class EntryWriter:
    """Writes utterances, one after the other; `finish` returns them as an `EntryFile`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = open(path, "wb")  # noqa: SIM115
        self._offsets = array("q")

    def append(self, entry: ManifestEntry) -> None:
        values = vars(entry) | {"audio": str(entry.audio)}
        self._offsets.append(self._file.tell())
        self._file.write(json.dumps(list(values.values())).encode("ascii") + b"\n")

    def finish(self) -> EntryFile:
        self._file.close()
        return EntryFile(self.path, np.array(self._offsets, np.int64))

    def __enter__(self) -> EntryWriter:
        return self

    def __exit__(self, *error: Any) -> None:
        self._file.close()


class EntryFile(Sequence[ManifestEntry]):
    """Utterances of a file that `EntryWriter` wrote: 8 bytes of memory for each.

    ``offsets`` [N] int64: where each starts in the file.
    """

    def __init__(self, path: Path, offsets: np.ndarray) -> None:
        self.path, self._offsets = path, offsets
        self._file = open(path, "rb")  # noqa: SIM115

    def select(self, chosen: np.ndarray) -> EntryFile:
        """Those at the indices, or where the mask is true, as an `EntryFile` of their own."""
        return EntryFile(self.path, self._offsets[chosen])

    def __len__(self) -> int:
        return len(self._offsets)

    @overload
    def __getitem__(self, index: int) -> ManifestEntry: ...
    @overload
    def __getitem__(self, index: slice) -> EntryFile: ...
    def __getitem__(self, index):
        if isinstance(index, slice):
            return EntryFile(self.path, self._offsets[index])
        self._file.seek(self._offsets[index])
        names = ManifestEntry.__dataclass_fields__
        values = dict(zip(names, json.loads(self._file.readline()), strict=True))
        return ManifestEntry(**values | {"audio": Path(values["audio"])})

    def __iter__(self) -> Iterator[ManifestEntry]:
        return (self[i] for i in range(len(self)))
