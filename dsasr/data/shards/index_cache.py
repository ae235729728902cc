"""The index of any shard: from the file beside it, or built from its tar and cached."""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path

from dsasr.data.shards.index import ShardIndex, build_index, load_index
from dsasr.data.shards.storage import ShardMissing, ShardReadError, ShardStorage
from dsasr.data.shards.urls import is_pipe
from dsasr.utils.io import atomic_write


def load_or_build_index(storage: ShardStorage, shard: str) -> ShardIndex:
    """A shard's index. Every rank gets the same one; the tar's bad samples are its ``bad``.

    Raises `ShardReadError` where the shard cannot be read.
    """
    if not is_pipe(shard):
        try:
            return load_index(storage.read_file(_index_url(shard)), shard)
        except ShardReadError as error:
            # The signature of a shard's URL is none for the index beside it.
            if "?" not in shard or not error.cause.startswith(("HTTP 401", "HTTP 403")):
                raise
        except (ShardMissing, ValueError, TypeError):
            pass
    try:
        return storage.with_local_copy(
            shard, lambda path: _cached_index(storage, Path(path), shard)
        )
    except ShardMissing:
        raise ShardReadError(shard, 1, "it does not exist") from None


def _cached_index(storage: ShardStorage, tar: Path, shard: str) -> ShardIndex:
    stat = tar.stat()
    identity = f"{shard}\n{stat.st_size}\n{stat.st_mtime_ns}"
    if tar.parent == storage.cache_folder:  # whose times are those of downloads
        identity = f"{shard}\n{stat.st_size}"
    name = hashlib.sha256(identity.encode()).hexdigest()[:32]
    cached = storage.config.folder() / "indexes" / f"{name}.index.json"
    with contextlib.suppress(OSError, ValueError, TypeError):
        return load_index(cached.read_bytes(), shard)
    index = build_index(tar, shard)
    with contextlib.suppress(OSError):  # a read-only home costs time, not correctness
        atomic_write(cached, index.dump())
    return index


def _index_url(shard: str) -> str:
    head, dot, _ = shard.rpartition(".tar")
    return f"{head if dot else shard}.index.json"
