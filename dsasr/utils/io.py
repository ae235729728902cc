"""Files and folders that appear whole or not at all, and JSON without NaN.

Both are written under a temporary name beside their target, fsynced and renamed ("Whole or not at
all"). The temporary name starts with a dot and ends in ``.tmp``, so that a reader's glob for
finished files never matches it, not even after a ``kill -9``.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any


def fsync_path(path: str | os.PathLike) -> None:
    """Make the content of a file durable, or the renames inside a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def fsync_tree(folder: Path) -> None:
    """`fsync_path` of all files and folders below ``folder``."""
    for path in folder.rglob("*"):
        fsync_path(path)


# -- files ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary file's path; it becomes ``path`` on success and is removed on failure."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        fsync_path(temporary)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
        fsync_path(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def atomic_write(path: str | os.PathLike, data: str | bytes) -> None:
    """Write ``data`` (text as UTF-8) to ``path``, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data.encode("utf-8") if isinstance(data, str) else data)


# -- folders -------------------------------------------------------------------------------------


@contextlib.contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """Yield an empty staging folder; it becomes ``target`` on success and is removed on failure.

    Every file below it is fsynced first. A folder that ``target`` names already is replaced.
    """
    staging = staging_folder(target)
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        yield staging
        fsync_tree(staging)
        replace_folder(staging, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def staging_folder(target: Path) -> Path:
    """The folder in which ``target`` is written before `replace_folder` renames it."""
    return target.parent / f".{target.name}.tmp"


def replace_folder(staging: Path, target: Path) -> None:
    """Rename ``staging``, whose files are fsynced, to ``target``.

    A folder that ``target`` names already is removed afterwards, and put back on failure.
    """
    old = target.parent / f".{target.name}.old.tmp"
    shutil.rmtree(old, ignore_errors=True)
    fsync_path(staging)
    if target.exists():
        os.rename(target, old)
    try:
        os.rename(staging, target)
    except OSError:
        if old.exists():
            os.rename(old, target)
        raise
    fsync_path(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def remove_folder(folder: Path) -> bool:
    """Remove ``folder`` so that a reader sees all of it or nothing; False: it could not be renamed.

    It is renamed first, and what is left of it after a kill is a temporary folder.
    """
    hidden = folder.parent / f".{folder.name}.gone.tmp"
    shutil.rmtree(hidden, ignore_errors=True)
    try:
        os.rename(folder, hidden)
    except OSError:
        return False
    shutil.rmtree(hidden, ignore_errors=True)
    return True


def remove_temporaries(folder: Path, spare: Sequence[str] = ()) -> None:
    """Remove the temporary files and folders that killed jobs left in ``folder``.

    ``spare``: names of final files whose temporaries may be in use by another job just now.
    """
    for path in folder.glob(".*.tmp"):
        if path.name.startswith(tuple(f".{name}" for name in spare)):
            continue
        with contextlib.suppress(OSError):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()


# -- JSON ----------------------------------------------------------------------------------------


def nonfinite_to_none(value: Any) -> Any:
    """``value`` with None in place of each float that is NaN or infinite; lists and dicts are
    copied."""
    if isinstance(value, dict):
        return {key: nonfinite_to_none(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [nonfinite_to_none(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def to_json(value: Any, **options: Any) -> str:
    """``value`` as JSON text; NaN and infinity, which JSON lacks, become null.

    ``options`` are those of `json.dumps`.
    """
    return json.dumps(nonfinite_to_none(value), allow_nan=False, ensure_ascii=False, **options)


def read_lines(path: Path) -> list[str]:
    """The lines of a UTF-8 file, split at line feeds alone.

    ``str.splitlines`` also splits at U+2028 and others, which a transcript in a JSON line may
    contain.
    """
    text = path.read_text(encoding="utf-8").removesuffix("\n")
    return text.split("\n") if text else []


def read_json_lines(path: Path) -> list[Any]:
    """The rows of a JSON-lines file; none where the file is missing.

    A torn line, as a running or killed job leaves it, is skipped.
    """
    rows = []
    for line in read_lines(path) if path.is_file() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows
