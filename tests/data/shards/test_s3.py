"""s3:// through s3fs, against a server that fails and truncates; moto's: test_s3_server."""

from __future__ import annotations

import contextlib
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from dsasr.data.shards.storage import (
    ShardReadError,
    ShardStorage,
    StorageConfig,
)

pytest.importorskip("s3fs")

BODY = bytes(i * 7 % 251 for i in range(50_000))
MISSING = b"<Error><Code>NoSuchKey</Code><Message>no</Message></Error>"


class Bucket(ThreadingHTTPServer):
    """An S3 server's answers to GET and HEAD of objects; ``faults``: one per GET."""

    daemon_threads = True

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.faults: list[int | str] = []
        self.gets: list[str] = []
        super().__init__(("127.0.0.1", 0), Answer)


class Answer(BaseHTTPRequestHandler):
    server: Bucket
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET(head=True)

    def do_GET(self, head: bool = False) -> None:
        fault = None
        if not head:
            self.server.gets.append(self.path)
            fault = self.server.faults.pop(0) if self.server.faults else None
        body, status = self.server.objects.get(self.path.split("?")[0].lstrip("/")), 200
        span = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")
        if isinstance(fault, int):
            body, status = b"<Error><Code>SlowDown</Code></Error>", fault
        elif body is None:
            body, status = MISSING, 404
        elif span and int(span[1]) >= len(body):
            body, status = b"<Error><Code>InvalidRange</Code></Error>", 416
        elif span:
            body, status = body[int(span[1]) : int(span[2]) + 1], 206
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", '"1"')
        self.send_header("Last-Modified", "Mon, 01 Jan 2024 00:00:00 GMT")
        self.end_headers()
        if head:
            return
        if fault == "cut":
            body, self.close_connection = body[: len(body) // 2], True
        with contextlib.suppress(OSError):
            self.wfile.write(body)


@pytest.fixture
def bucket(monkeypatch):
    server = Bucket()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    for name, value in (
        ("AWS_ACCESS_KEY_ID", "k"), ("AWS_SECRET_ACCESS_KEY", "s"), ("AWS_DEFAULT_REGION", "r-1"),
    ):  # fmt: skip
        monkeypatch.setenv(name, value)
    yield server
    server.shutdown()
    server.server_close()


def sources(tmp_path: Path, **given) -> ShardStorage:
    options = {"cache": str(tmp_path / "cache"), "backoff": 0.01, "timeout": 2.0, "attempts": 3}
    return ShardStorage(StorageConfig(**{**options, **given}))


@pytest.mark.parametrize("faults", [[503], [500, 503], ["cut"], ["cut", 503]])
def test_faults_are_survived(bucket, tmp_path, faults) -> None:
    bucket.objects["b/x.tar"] = BODY
    bucket.faults = list(faults)
    assert sources(tmp_path).read("s3://b/x.tar", 1000, 40_000) == BODY[1000:41_000]
    assert not bucket.faults


def test_a_store_that_stays_bad_ends_in_a_named_error(bucket, tmp_path) -> None:
    bucket.objects["b/x.tar"] = BODY
    bucket.faults = [503] * 200
    with pytest.raises(ShardReadError, match=r"cannot read s3://b/x\.tar after 1 attempt"):
        sources(tmp_path, attempts=1).read("s3://b/x.tar", 0, 10)
