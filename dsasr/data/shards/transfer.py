"""Bytes of remote files: http(s) by urllib, all else by fsspec; whole files and byte ranges.

What a server sends is compared with the request: a range with its Content-Range, a file with
its Content-Length, a tar without a length with a tar's form. A login page, a shifted range and a
body that ends early are read again, and never taken for a shard.
"""

from __future__ import annotations

import errno
import http.client
import os
import re
import urllib.error
import urllib.request
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from dsasr.data.shards.tars import is_tar
from dsasr.utils import ranges
from dsasr.utils.credentials import split_user
from dsasr.utils.errors import Failure, UserError
from dsasr.utils.masking import mask
from dsasr.utils.ranges import NonNegativeFloat, Range

CHUNK = 1 << 20  # bytes
_END = 1024  # bytes of zeros that end a tar
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")


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


class WrongResponse(OSError):
    """A response that does not match the request; worth another try."""


class Transfer:
    """Reads remote files. After a fork, both copies work."""

    def __init__(self, config: StorageConfig) -> None:
        self.config = config
        self.owner = os.getpid()
        self.systems: dict[str, Any] = {}

    def stream(
        self, url: str, offset: int | None, size: int | None
    ) -> Generator[bytes, None, bool]:
        """The body of a file or range, in pieces; raises EOFError if it ends early.

        Returns whether its length was known beforehand: False where a cut would not be seen.
        """
        if url.startswith(("http://", "https://")):
            return (yield from self._http(url, offset, size))
        system = self._system(url)
        try:
            if offset is None:
                with system.open(url, "rb") as file:
                    while piece := file.read(CHUNK):
                        yield piece
            else:
                data = system.cat_file(url, start=offset, end=offset + size)
                if len(data) > size:
                    raise WrongResponse(f"{len(data)} bytes where {size} were requested")
                yield data
        except OSError as error:
            # S3's error for a range after the object's end.
            past_end = error.errno == errno.EINVAL and "range" in str(error).lower()
            if offset is None or not past_end:
                raise
        except Exception as error:  # each of fsspec's packages raises other classes
            raise OSError(f"{type(error).__name__}: {error}") from error
        return True

    def _http(self, url: str, offset: int | None, size: int | None) -> Generator[bytes, None, bool]:
        request = self._request(url)
        if offset is not None:
            request.add_header("Range", f"bytes={offset}-{offset + size - 1}")
        try:
            response = urllib.request.urlopen(request, timeout=self.config.timeout)
        except urllib.error.HTTPError as error:
            if error.code == 416:  # the range starts past the end
                error.close()
                return True
            raise
        with response:
            expected = _expected(url, response, offset, size)
            received = 0
            while piece := response.read(CHUNK):
                received += len(piece)
                yield piece
            if expected is not None and received != expected:
                raise EOFError(f"connection closed after {received} of {expected} bytes")
            return expected is not None

    def size(self, url: str) -> int | None:
        """Bytes of a file; None where the server does not say."""
        try:
            if not url.startswith(("http://", "https://")):
                return int(self._system(url).info(url)["size"])
            request = self._request(url, "HEAD")
            with urllib.request.urlopen(request, timeout=self.config.timeout) as response:
                length = response.headers.get("Content-Length")
                is_page = response.headers.get_content_type() == "text/html"
                return None if is_page or length is None else int(length)
        except UserError:
            raise
        except Exception:  # whatever fails here fails by name where the bytes are read
            return None

    def glob(self, pattern: str) -> list[str]:
        """The URLs of files that match. Raises OSError."""
        protocol = pattern.split("://", 1)[0]
        try:
            return [f"{protocol}://{name}" for name in self._system(pattern).glob(pattern)]
        except (OSError, UserError):
            raise
        except Exception as error:  # each of fsspec's packages raises other classes
            raise OSError(f"{type(error).__name__}: {error}") from error

    @staticmethod
    def _request(url: str, method: str = "GET") -> urllib.request.Request:
        url, headers = split_user(url)
        request = urllib.request.Request(url, method=method)
        for name, value in headers.items():
            request.add_unredirected_header(name, value)  # not for another host
        return request

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
                fix = "pip install 'dsasr[s3]'" if protocol in ("s3", "s3a") else error
                raise UserError(f"{protocol}:// needs another package: {fix}") from None
        return self.systems[protocol]


def _expected(
    url: str, response: http.client.HTTPResponse, offset: int | None, size: int | None
) -> int | None:
    """Bytes that a response must have; None where it does not say.

    Raises `WrongResponse` for another range than was requested.
    """
    length = response.headers.get("Content-Length")
    if offset is None:
        return None if length is None else int(length)
    if response.status != 206:
        if response.headers.get_content_type() == "text/html":
            raise WrongResponse("a web page instead of the file: a login, perhaps")
        raise UserError(
            f"{url} cannot be read by range (HTTP {response.status}): set source.cache_gb"
        )
    said = response.headers.get("Content-Range") or ""
    found = _CONTENT_RANGE.fullmatch(said.strip())
    if found is None:
        raise WrongResponse(f"a range without its place ({said or 'no Content-Range'})")
    first, last = int(found[1]), int(found[2])
    end = min(offset + size, int(found[3])) if found[3] != "*" else None
    if first != offset or last < first or last >= offset + size or end not in (None, last + 1):
        raise WrongResponse(f"{said} where bytes {offset}-{offset + size - 1} were requested")
    return last + 1 - first


def check_tar(path: Path, whole: bool) -> None:
    """Raise `WrongResponse` unless a download is a tar; ``whole``: its length was known."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        head = file.read(512)
        file.seek(max(0, size - _END))
        end = file.read()
    if not is_tar(head) or not head:
        raise WrongResponse(f"no tar but {head[:20]!r}…: a login page, perhaps")
    if not whole and (size % 512 or any(end) or len(end) < _END):
        raise WrongResponse(f"a tar that ends after {size} bytes")
