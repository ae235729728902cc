"""train.py on a full snapshot store: rank 1 cannot write snapshots, rank 0 no in-use marks.

Each write fails on one rank alone, as it may where the ranks are on several machines.
"""

from __future__ import annotations

import os
from pathlib import Path

from dsasr import train
from dsasr.checkpoint import snapshot_store, tensor_fragments
from dsasr.utils import distributed
from dsasr.utils.errors import run_tool

FULL = OSError(28, "No space left on device")
write_file, atomic_write = tensor_fragments.write_file, snapshot_store.atomic_write


def fails(path: Path, rank: str) -> bool:
    return os.environ["RANK"] == rank and "snapshots" in Path(path).parts


def write_file_or_fail(path: Path, fragments: dict) -> str:
    if fails(path, "1"):
        raise FULL
    return write_file(path, fragments)


def write_mark_or_fail(path: Path, data: str) -> None:
    if fails(path, "0") and Path(path).name.startswith(snapshot_store.IN_USE):
        raise FULL
    atomic_write(path, data)


tensor_fragments.write_file = write_file_or_fail
snapshot_store.atomic_write = write_mark_or_fail
distributed.end_process(run_tool(train.main_once))
