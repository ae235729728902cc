"""Access to shards on local and shared file systems, http(s) and s3, with a local cache.

Names are resolved once (globs, braces, dataset folders). Bytes are read by range, with timeouts,
retries and back-off; a `ShardReadError` names the URL, the number of attempts and the cause. A
network failure is never a bad sample: a sample that was not read would be lost silently, so the
run stops instead ("Nothing silent").
"""

from __future__ import annotations

import contextlib
import glob
import http.client
import json
import os
import subprocess
import time
import urllib.error
from collections import OrderedDict
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import BinaryIO, TypeVar

import numpy as np

from dsasr.data.shards.sample import SampleFields
from dsasr.data.shards.shard_cache import ShardCache
from dsasr.data.shards.tars import is_macos_extra
from dsasr.data.shards.transfer import (
    ShardMissing,
    ShardReadError,
    ShardTruncated,
    StorageConfig,
    Transfer,
    check_tar,
)
from dsasr.data.shards.urls import ShardList, expand_braces, is_pipe, is_remote, join_shard_lists
from dsasr.utils.credentials import resolve
from dsasr.utils.errors import UserError, first_line
from dsasr.utils.io import atomic_path
from dsasr.utils.names import is_language

T = TypeVar("T")
Span = tuple[int, int]  # offset, size in bytes
MAX_GAP = 8192  # bytes between two ranges of a remote shard that one request reads along
MAX_OPEN_FILES = 64
MAX_FILE = 512 << 20  # bytes of a dataset.json or an index
MAX_CHECKED = 1024  # local shards of a list whose existence is checked at start-up


def _check_size(url: str, size: int) -> None:
    if size > MAX_FILE:
        raise UserError(f"{url} has more than {MAX_FILE:,} bytes: it is no index or dataset.json")


def _is_pattern(name: str) -> bool:
    """Whether a name stands for several: local ones by *, ? and [], remote ones by * and []."""
    if not is_remote(name):
        return glob.has_magic(name)
    path = name.partition("://")[2].partition("/")[2].partition("?")[0]
    return "*" in path or "[" in path


class ShardStorage:
    """Resolves names of shards, and reads files and byte ranges. After a fork, both copies work."""

    def __init__(self, config: StorageConfig | None = None) -> None:
        self.config = config or StorageConfig()
        self.files: OrderedDict[str, int] = OrderedDict()
        self.transfer = Transfer(self.config)
        # Of shards that others made: where their samples' labels stand.
        self.fields: dict[str, SampleFields] = {}
        self.bytes = 0

    def resolve(self, spec: str | Sequence[str], fields: SampleFields | None = None) -> ShardList:
        """Shards of a dataset folder, ``dataset.json``, tar, glob or brace pattern, or of a list.

        ``fields``: where their samples' labels stand; None: as their indexes say, or as ours do.
        Raises `UserError` where nothing is found, a shard is missing or named twice.
        """
        found = self._resolve(spec)
        if fields is not None:
            self.fields |= dict.fromkeys(found.shards, fields)
        return found

    def _resolve(self, spec: str | Sequence[str]) -> ShardList:
        if not spec:
            raise UserError("no shard is named: give a folder, a tar or a pattern")
        if not isinstance(spec, str):
            return join_shard_lists([self._resolve(item) for item in spec])
        spec = spec.removeprefix("file://")
        spec = spec if is_pipe(spec) else resolve(spec)
        if is_pipe(spec):
            self._check_pipe(spec)
            return ShardList(list(expand_braces(spec)))
        if spec.endswith("dataset.json") or (not is_remote(spec) and os.path.isdir(spec)):
            return self._from_dataset(spec)
        if is_remote(spec) and spec.endswith("/"):
            return self._from_dataset(spec)
        shards: list[str] = []
        for name in expand_braces(spec):
            if _is_pattern(name):
                found = self._list(name) if is_remote(name) else glob.glob(name)
                matches = sorted(match for match in found if not is_macos_extra(match))
                if not matches:
                    raise UserError(f"no shard matches '{name}'")
                shards += matches
            else:
                shards.append(name)
        local = [name for name in shards if not is_remote(name)]
        for name in local[:: max(1, len(local) // MAX_CHECKED)]:
            if not os.path.isfile(name):
                raise UserError(
                    f"there is no shard '{name}': give its path, or make it with "
                    "`dsasr data make-shards`"
                )
        if len(set(shards)) < len(shards):
            raise UserError(f"'{spec}' names a shard twice")
        # What is stored at a checkpoint, so that other tars under these names are noticed.
        step = max(1, len(shards) // MAX_CHECKED)
        sizes = [0 if is_remote(name) else os.path.getsize(name) for name in shards[::step]]
        return ShardList(shards, sizes=np.array(sizes, np.int64))

    def _list(self, pattern: str) -> list[str]:
        """The remote files that ``pattern`` names."""
        if pattern.startswith(("http://", "https://")):
            raise UserError(
                f"'{pattern}': a web server lists no files; name them with braces ({{000..009}}), "
                "or the folder of a dataset.json"
            )
        return self._retry(pattern, lambda: self.transfer.glob(pattern))

    def _from_dataset(self, spec: str) -> ShardList:
        path = spec if spec.endswith("dataset.json") else spec.rstrip("/") + "/dataset.json"
        root = path[: -len("dataset.json")]
        try:
            data = json.loads(self.read_file(path))
            names = [shard["name"] for shard in data["shards"]]
            counts = np.array([shard["samples"] for shard in data["shards"]], np.int32)
            sizes = np.array([shard.get("bytes", 0) for shard in data["shards"]], np.int64)
            langs = {lang: float(v["hours"]) for lang, v in data.get("langs", {}).items()}
            hours = float(data["hours"])
            if not all(map(is_language, langs)):
                raise ValueError("a language's name is none")
        except ShardMissing:
            raise UserError(
                f"'{spec}' has no dataset.json: pack it with `dsasr data make-shards`, or name tars"
            ) from None
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            raise UserError(f"{path} is not a dataset.json: {first_line(error)}") from None
        except RecursionError:
            raise UserError(f"{path} is not a dataset.json: it nests too deep") from None
        if any("/" in name or not name.endswith(".tar") for name in names):
            raise UserError(f"{path} names shards that are not plain *.tar files beside it")
        if not is_remote(root):
            there = set(os.listdir(root or "."))
            if missing := [name for name in names if name not in there]:
                raise UserError(
                    f"{path} names {len(missing):,} shards that are not there, such as "
                    f"{missing[0]}: copy them again, or pack the dataset again"
                )
        return ShardList([root + name for name in names], counts, hours, langs, sizes)

    def read_file(self, url: str) -> bytes:
        """A file's content. Raises `ShardMissing` or `ShardReadError`."""
        if is_remote(url):
            return self._retry(url, lambda: self._fetch(url, None, None, MAX_FILE))
        try:
            with open(url.removeprefix("file://"), "rb") as file:
                data = file.read(MAX_FILE + 1)
        except (FileNotFoundError, NotADirectoryError):
            raise ShardMissing(url) from None
        except OSError as error:
            raise ShardReadError(url, 1, str(error)) from None
        self.bytes += len(data)
        _check_size(url, len(data))
        return data

    def read(self, url: str, offset: int, size: int) -> bytes:
        """``size`` bytes at ``offset``. Raises `ShardTruncated` where the shard ends before."""
        try:
            if is_remote(url) and not self.config.cache_gb:
                data = self._retry(url, lambda: self._fetch(url, offset, size))
            else:
                data = self.with_local_copy(url, lambda path: self._pread(path, offset, size))
        except ShardMissing:
            raise ShardReadError(url, 1, "it does not exist") from None
        self.bytes += len(data)
        if len(data) < size:
            raise ShardTruncated(f"{len(data)} of {size} bytes at {offset}")
        return data

    def read_two(self, url: str, a: Span, b: Span) -> tuple[bytes, bytes]:
        """Two ranges of a shard: in one request if the shard is remote and they are close."""
        first, last = min(a[0], b[0]), max(sum(a), sum(b))
        uncached = is_remote(url) and not self.config.cache_gb
        if not uncached or last - first > a[1] + b[1] + MAX_GAP:
            return self.read(url, *a), self.read(url, *b)
        data = self.read(url, first, last - first)
        return tuple(data[offset - first : offset - first + size] for offset, size in (a, b))

    def with_local_copy(self, url: str, act: Callable[[str], T]) -> T:
        """``act`` on the path of a whole local shard; remote ones are downloaded into the cache.

        If another process evicts it before ``act`` has opened it, it is downloaded again.
        Raises `ShardMissing` or `ShardReadError`.
        """
        cached = is_remote(url) or is_pipe(url)

        def attempt() -> T:
            try:
                return act(self._cached(url) if cached else url.removeprefix("file://"))
            except FileNotFoundError:
                if not cached:
                    raise
                raise OSError("it left the cache at once: raise source.cache_gb") from None

        return self._retry(url, attempt)

    def close(self) -> None:
        for handle in self.files.values():
            os.close(handle)
        self.files.clear()

    def _check_pipe(self, url: str) -> None:
        if not self.config.allow_pipe:
            raise UserError(
                f"'{url}' would run a shell command: set source.allow_pipe=true if that is meant"
            )

    def _pread(self, path: str, offset: int, size: int) -> bytes:
        handle = self.files.get(path)
        if handle is None:
            handle = os.open(path, os.O_RDONLY)
            self.files[path] = handle
            while len(self.files) > MAX_OPEN_FILES:
                os.close(self.files.popitem(last=False)[1])
        else:
            self.files.move_to_end(path)
        try:
            data = os.pread(handle, size, offset)
            while len(data) < size:  # a signal or a network file system may shorten a read
                rest = os.pread(handle, size - len(data), offset + len(data))
                if not rest:
                    break
                data += rest
            return data
        except OSError:
            os.close(self.files.pop(path))  # a stale handle: the next attempt opens anew
            raise

    def _retry(self, url: str, act: Callable[[], T]) -> T:
        cause = ""
        for attempt in range(self.config.attempts):
            if attempt:
                time.sleep(min(self.config.backoff * 2 ** (attempt - 1), 30.0))
            try:
                return act()
            except (ShardMissing, UserError):
                raise
            except urllib.error.HTTPError as error:
                error.close()
                if error.code in (404, 410):
                    raise ShardMissing(url) from None
                cause = f"HTTP {error.code} {error.reason}"
                if error.code in (400, 401, 403, 405):
                    raise ShardReadError(url, attempt + 1, cause) from None
            except FileNotFoundError:
                raise ShardMissing(url) from None
            except (OSError, http.client.HTTPException, EOFError) as error:
                cause = f"{type(error).__name__}: {error}"
        raise ShardReadError(url, self.config.attempts, cause)

    def _fetch(
        self, url: str, offset: int | None, size: int | None, most: int | None = None
    ) -> bytes:
        """``most``: bytes of a file that is read whole; one without an end is refused."""
        pieces, count = [], 0
        with contextlib.closing(self.transfer.stream(url, offset, size)) as stream:
            for piece in stream:
                pieces.append(piece)
                count += len(piece)
                if most is not None:
                    _check_size(url, count)
        return b"".join(pieces)

    def size(self, url: str) -> int | None:
        """Bytes of a shard; None where it is unknown."""
        if is_pipe(url):
            return None
        if is_remote(url):
            return self.transfer.size(url)
        with contextlib.suppress(OSError):
            return os.path.getsize(url.removeprefix("file://"))
        return None

    @property
    def cache_folder(self) -> Path:
        """The folder of whole shards."""
        return self.config.folder() / "shards"

    def _cached(self, url: str) -> str:
        cache = ShardCache(self.cache_folder, self.config.cache_gb * 1e9)
        return cache.path(url, lambda path: self._retry(url, lambda: self._download(url, path)))

    def _download(self, url: str, path: Path) -> None:
        with atomic_path(path) as temporary, open(temporary, "wb") as file:
            if is_pipe(url):
                self._check_pipe(url)
                command = url.removeprefix("pipe:")
                done = subprocess.run(command, shell=True, stdout=file, check=False)
                if done.returncode:
                    raise OSError(f"the command ended with {done.returncode}")
                return
            whole = self._copy(self.transfer.stream(url, None, None), file)
            file.flush()
            check_tar(temporary, whole)

    def _copy(self, stream: Generator[bytes, None, bool], file: BinaryIO) -> bool:
        """Write what ``stream`` yields; what it returns."""
        with contextlib.closing(stream):
            while True:
                try:
                    piece = next(stream)
                except StopIteration as end:
                    return end.value
                file.write(piece)
                self.bytes += len(piece)
