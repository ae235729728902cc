"""The index of any shard: from the file beside it, or built from its tar and cached."""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path

from dsasr.data.shards.build_index import build_index
from dsasr.data.shards.index import ShardIndex, load_index
from dsasr.data.shards.sample import OWN_FIELDS, BadSample, SampleFields
from dsasr.data.shards.storage import ShardMissing, ShardReadError, ShardStorage
from dsasr.data.shards.urls import is_pipe
from dsasr.utils.io import atomic_write


def load_or_build_index(storage: ShardStorage, shard: str) -> ShardIndex:
    """A shard's index. Every rank gets the same one; the tar's bad samples are its ``bad``.

    An index of a tar of another size is stale: the tar's own is built, and ``bad`` says so. One
    with other fields than the dataset's (`ShardStorage.fields`) is not read.
    Raises `ShardReadError` where the shard cannot be read.
    """
    wanted, stale = storage.fields.get(shard), []
    if not is_pipe(shard):
        try:
            index = load_index(storage.read_file(_index_url(shard)), shard)
            stale = _stale(storage, shard, index)
            if not stale and wanted in (None, index.fields):
                return index
            wanted = wanted or index.fields
        except ShardReadError as error:
            # The signature of a shard's URL is none for the index beside it.
            if "?" not in shard or not error.cause.startswith(("HTTP 401", "HTTP 403")):
                raise
        except (ShardMissing, ValueError, TypeError):
            pass
    try:
        index = storage.with_local_copy(
            shard, lambda path: _cached_index(storage, Path(path), shard, wanted or OWN_FIELDS)
        )
    except ShardMissing:
        raise ShardReadError(shard, 1, "it does not exist") from None
    index.bad = (*stale, *index.bad)
    return index


def _stale(storage: ShardStorage, shard: str, index: ShardIndex) -> list[BadSample]:
    """Why the index file is not this tar's; empty if it is, or if that is unknown."""
    if index.tar_size is None:
        return []
    size = storage.size(shard)
    if size in (None, index.tar_size):
        return []
    detail = f"of {index.tar_size:,} bytes, the tar has {size:,}: run `dsasr data index` again"
    return [BadSample("stale_index", shard, "", detail)]


def _cached_index(storage: ShardStorage, tar: Path, shard: str, fields: SampleFields) -> ShardIndex:
    stat = tar.stat()
    identity = f"{shard}\n{stat.st_size}\n{stat.st_mtime_ns}"
    if tar.parent == storage.cache_folder:  # whose times are those of downloads
        identity = f"{shard}\n{stat.st_size}"
    if fields != OWN_FIELDS:
        identity += f"\n{fields}"
    name = hashlib.sha256(identity.encode()).hexdigest()[:32]
    cached = storage.config.folder() / "indexes" / f"{name}.index.json"
    with contextlib.suppress(OSError, ValueError, TypeError):
        return load_index(cached.read_bytes(), shard)
    index = build_index(tar, shard, fields)
    with contextlib.suppress(OSError):  # a read-only home costs time, not correctness
        atomic_write(cached, index.dump())
    return index


def _index_url(shard: str) -> str:
    head, dot, _ = shard.rpartition(".tar")
    return f"{head if dot else shard}.index.json"
