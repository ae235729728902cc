"""The local cache of whole remote shards, shared by processes, within a limit of bytes."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from dsasr.utils.masking import mask

STALE_SECONDS = 3600.0  # without a byte, after which a partial download is removed


class ShardCache:
    """``limit`` in bytes; 0: no limit, as for shards that only pass through."""

    def __init__(self, folder: Path, limit: float) -> None:
        self.folder, self.limit = folder, limit

    def path(self, url: str, download: Callable[[Path], None]) -> str:
        """The cached file of ``url``; ``download`` writes one that is not there, whole or not at
        all."""
        folder = self.folder
        name = hashlib.sha256(mask(url).encode()).hexdigest()[:32] + ".tar"
        path = folder / name
        if not path.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            with locked(folder / f".{name}.lock"):
                if not path.is_file():
                    download(path)
            self._evict(keep=path)
        with contextlib.suppress(OSError):
            os.utime(path)
        return str(path)

    def _evict(self, keep: Path) -> None:
        """Remove the least recently used shards above the limit. Open ones stay readable."""
        folder, limit = self.folder, self.limit
        if limit <= 0:
            return
        lock = folder / ".evict.lock"
        with locked(lock):
            os.utime(lock)
            now = lock.stat().st_mtime  # by the file system's clock, like the shards' times
            for partial in folder.glob(".*.tmp"):  # of a download, which may have been killed
                with contextlib.suppress(OSError):
                    if partial.stat().st_mtime < now - STALE_SECONDS:
                        partial.unlink()
            cached = []
            for path in folder.glob("*.tar"):
                with contextlib.suppress(OSError):
                    stat = path.stat()
                    cached.append((stat.st_mtime_ns, stat.st_size, path))
            total = sum(size for _, size, _ in cached)
            for _, size, path in sorted(cached):
                if total <= limit:
                    break
                if path != keep:
                    path.unlink(missing_ok=True)
                    (folder / f".{path.name}.lock").unlink(missing_ok=True)
                    total -= size


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock of the file ``path``."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        # Closing is not enough: a worker that was forked meanwhile has a copy, locked as well.
        fcntl.flock(handle, fcntl.LOCK_UN)
        os.close(handle)
