"""Access to shards on local and shared file systems, http(s) and s3, with a local cache.

Names are resolved once (globs, braces, dataset folders). Bytes are read by range, with timeouts,
retries and back-off; a `ShardReadError` names the URL, the number of attempts and the cause. A
network failure is never a bad sample: a sample that was not read would be lost silently, so the
run stops instead ("Nothing silent").
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import hashlib
import http.client
import json
import os
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import numpy as np

from dsasr.data.shards.urls import ShardList, expand_braces, is_pipe, is_remote, join_shard_lists
from dsasr.utils import ranges
from dsasr.utils.credentials import resolve, split_user
from dsasr.utils.errors import Failure, UserError, first_line
from dsasr.utils.io import atomic_path
from dsasr.utils.masking import mask
from dsasr.utils.names import is_language
from dsasr.utils.ranges import NonNegativeFloat, Range

T = TypeVar("T")
Span = tuple[int, int]  # offset, size in bytes
CHUNK = 1 << 20  # bytes
MAX_GAP = 8192  # bytes between two ranges of a remote shard that one request reads along
MAX_OPEN_FILES = 64
MAX_FILE = 512 << 20  # bytes of a dataset.json or an index
STALE_SECONDS = 3600.0  # without a byte, after which a partial download is removed
MAX_CHECKED = 1024  # local shards of a list whose existence is checked at start-up


@dataclass(frozen=True)
class StorageConfig:
    """Access to shards. ``cache_gb`` > 0 caches whole remote shards in ``cache``."""

    cache: str = ""  # folder for remote shards; empty: $XDG_CACHE_HOME/dsasr, or ~/.cache/dsasr
    # GB of whole remote shards kept in the cache; 0: read by range, nothing kept
    cache_gb: NonNegativeFloat = 0.0
    # seconds without a byte after which a read is tried again
    timeout: Annotated[float, Range(0, 86_400, above=True)] = 20.0
    # tries of a read before its shard counts as failed; at least 1
    attempts: Annotated[int, Range(1, 1000)] = 5
    # seconds before the second try; doubles with each one
    backoff: Annotated[float, Range(0, 3600)] = 0.5
    allow_pipe: bool = False  # run the shell commands of pipe: URLs

    def __post_init__(self) -> None:
        ranges.check(self)

    def folder(self) -> Path:
        base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        return Path(self.cache or os.path.join(base, "dsasr"))


class ShardReadError(Failure):
    """A shard that could not be read: ``url``, ``attempts`` made, ``cause`` of the last one."""

    def __init__(self, url: str, attempts: int, cause: str) -> None:
        super().__init__(url, attempts, cause)
        self.url, self.attempts, self.cause = mask(url), attempts, mask(cause)

    def __str__(self) -> str:
        times = f"{self.attempts} attempt{'s' if self.attempts != 1 else ''}"
        return f"cannot read {self.url} after {times}: {self.cause}"


class ShardMissing(Exception):
    """The file system or server answered that the file does not exist."""


class ShardTruncated(Exception):
    """A read past the end of a shard that is shorter than its index says."""


def _check_size(url: str, size: int) -> None:
    if size > MAX_FILE:
        raise UserError(f"{url} has more than {MAX_FILE:,} bytes: it is no index or dataset.json")


class ShardStorage:
    """Resolves names of shards, and reads files and byte ranges. After a fork, both copies work."""

    def __init__(self, config: StorageConfig | None = None) -> None:
        self.config = config or StorageConfig()
        self.files: OrderedDict[str, int] = OrderedDict()
        self.owner = os.getpid()
        self.systems: dict[str, Any] = {}
        self.bytes = 0

    def resolve(self, spec: str | Sequence[str]) -> ShardList:
        """Shards of a dataset folder, ``dataset.json``, tar, glob or brace pattern, or of a list.

        Raises `UserError` where nothing is found, a shard is missing or named twice.
        """
        if not spec:
            raise UserError("no shard is named: give a folder, a tar or a pattern")
        if not isinstance(spec, str):
            return join_shard_lists([self.resolve(item) for item in spec])
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
            if not is_remote(name) and glob.has_magic(name):
                matches = sorted(glob.glob(name))
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
        return ShardList(shards)

    def _from_dataset(self, spec: str) -> ShardList:
        path = spec if spec.endswith("dataset.json") else spec.rstrip("/") + "/dataset.json"
        root = path[: -len("dataset.json")]
        try:
            data = json.loads(self.read_file(path))
            names = [shard["name"] for shard in data["shards"]]
            counts = np.array([shard["samples"] for shard in data["shards"]], np.int32)
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
        return ShardList([root + name for name in names], counts, hours, langs)

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
        with contextlib.closing(self._stream(url, offset, size)) as stream:
            for piece in stream:
                pieces.append(piece)
                count += len(piece)
                if most is not None:
                    _check_size(url, count)
        return b"".join(pieces)

    def _stream(self, url: str, offset: int | None, size: int | None) -> Iterator[bytes]:
        """The body of a file or range, in pieces; raises EOFError if it ends early."""
        if url.startswith(("http://", "https://")):
            yield from self._http(url, offset, size)
            return
        system = self._system(url)
        try:
            if offset is None:
                with system.open(url, "rb") as file:
                    while piece := file.read(CHUNK):
                        yield piece
            else:
                yield system.cat_file(url, start=offset, end=offset + size)
        except OSError as error:
            # S3's error for a range after the object's end.
            past_end = error.errno == errno.EINVAL and "range" in str(error).lower()
            if offset is None or not past_end:
                raise
        except Exception as error:  # each of fsspec's packages raises other classes
            raise OSError(f"{type(error).__name__}: {error}") from error

    def _http(self, url: str, offset: int | None, size: int | None) -> Iterator[bytes]:
        url, headers = split_user(url)
        request = urllib.request.Request(url)
        for name, value in headers.items():
            request.add_unredirected_header(name, value)  # not for another host
        if offset is not None:
            request.add_header("Range", f"bytes={offset}-{offset + size - 1}")
        try:
            response = urllib.request.urlopen(request, timeout=self.config.timeout)
        except urllib.error.HTTPError as error:
            if error.code == 416:  # the range starts past the end
                error.close()
                return
            raise
        with response:
            if offset is not None and response.status != 206:
                raise UserError(
                    f"{url} cannot be read by range (HTTP {response.status}): set source.cache_gb"
                )
            expected = response.headers.get("Content-Length")
            received = 0
            while piece := response.read(CHUNK):
                received += len(piece)
                yield piece
            if expected is not None and received < int(expected):
                raise EOFError(f"connection closed after {received} of {expected} bytes")

    def _system(self, url: str) -> Any:
        """fsspec's file system of a URL's protocol."""
        protocol = url.split("://", 1)[0]
        if self.owner != os.getpid():  # a fork copies the connections, but not their threads
            self.owner, self.systems = os.getpid(), {}
        if protocol not in self.systems:
            try:
                import fsspec

                # After a fork, fsspec's own cache has the parent's instances: do not use it.
                options: dict[str, Any] = {"skip_instance_cache": True}
                if protocol in ("s3", "s3a"):
                    wait = {"read_timeout": self.config.timeout, "connect_timeout": 10}
                    options["config_kwargs"] = wait | {"retries": {"max_attempts": 1}}
                self.systems[protocol] = fsspec.filesystem(protocol, **options)
            except (ImportError, ValueError) as error:
                raise UserError(f"{protocol}:// needs another package: {error}") from None
        return self.systems[protocol]

    @property
    def cache_folder(self) -> Path:
        """The folder of whole shards."""
        return self.config.folder() / "shards"

    def _cached(self, url: str) -> str:
        folder = self.cache_folder
        name = hashlib.sha256(mask(url).encode()).hexdigest()[:32] + ".tar"
        path = folder / name
        if not path.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            with _locked(folder / f".{name}.lock"):
                if not path.is_file():
                    self._retry(url, lambda: self._download(url, path))
            self._evict(folder, keep=path)
        with contextlib.suppress(OSError):
            os.utime(path)
        return str(path)

    def _download(self, url: str, path: Path) -> None:
        with atomic_path(path) as temporary, open(temporary, "wb") as file:
            if is_pipe(url):
                self._check_pipe(url)
                command = url.removeprefix("pipe:")
                done = subprocess.run(command, shell=True, stdout=file, check=False)
                if done.returncode:
                    raise OSError(f"the command ended with {done.returncode}")
            else:
                with contextlib.closing(self._stream(url, None, None)) as stream:
                    for piece in stream:
                        file.write(piece)
                        self.bytes += len(piece)

    def _evict(self, folder: Path, keep: Path) -> None:
        """Remove the least recently used shards above the limit. Open ones stay readable."""
        limit = self.config.cache_gb * 1e9
        if limit <= 0:
            return
        lock = folder / ".evict.lock"
        with _locked(lock):
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
def _locked(path: Path) -> Iterator[None]:
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        # Closing is not enough: a worker that was forked meanwhile has a copy, locked as well.
        fcntl.flock(handle, fcntl.LOCK_UN)
        os.close(handle)
