"""Files that appear whole or not at all (written beside their place, fsynced, renamed); JSON."""

from __future__ import annotations

import contextlib
import json
import math
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def fsync_dir(folder: str | os.PathLike) -> None:
    """Make renames inside ``folder`` durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def fsync_file(path: str | os.PathLike) -> None:
    """Make the content of ``path`` durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path in the same folder; on success it becomes ``path``, else it goes.

    The temporary name starts with a dot and ends in ``.tmp``, so that a reader's glob for finished
    files never meets it, not even after a ``kill -9``.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        fsync_file(temporary)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
        fsync_dir(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def atomic_write(path: str | os.PathLike, data: str | bytes) -> None:
    """Write ``data`` (text as UTF-8) to ``path``, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data.encode("utf-8") if isinstance(data, str) else data)


def nonfinite_to_none(value: Any) -> Any:
    """``value``, of which lists and dicts are copied, with None for every float that is no number
    or infinite."""
    if isinstance(value, dict):
        return {key: nonfinite_to_none(held) for key, held in value.items()}
    if isinstance(value, (list, tuple)):
        return [nonfinite_to_none(held) for held in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def to_json(value: Any, **options: Any) -> str:
    """``value`` as JSON, which has no NaN and no infinity: both are null.

    ``options`` are `json.dumps`'s.
    """
    return json.dumps(nonfinite_to_none(value), allow_nan=False, ensure_ascii=False, **options)


def read_lines(path: Path) -> list[str]:
    """The lines of a UTF-8 file, cut at line feeds alone.

    ``str.splitlines`` also cuts at U+2028 and others, which a transcript in a JSON line may hold.
    """
    text = path.read_text(encoding="utf-8").removesuffix("\n")
    return text.split("\n") if text else []


def read_json_lines(path: Path) -> list[Any]:
    """The rows of a file of JSON lines, none where it is missing; torn ones, as of a run that goes
    on or was killed, are left out."""
    found = []
    for line in read_lines(path) if path.is_file() else ():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found
