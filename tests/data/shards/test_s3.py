"""s3:// through fsspec's own s3fs, against a server on loopback that also fails and truncates."""

from __future__ import annotations

import contextlib
import io
import json
import re
import tarfile
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import soundfile

from dsasr.data.dataloader.bucketing import BatchConfig
from dsasr.data.dataloader.dataloader import DataLoaderConfig, DatasetConfig, StreamingDataLoader
from dsasr.data.shards.storage import (
    ShardMissing,
    ShardReadError,
    ShardStorage,
    ShardTruncated,
    StorageConfig,
)
from dsasr.data.shards.writer import PackedSample, shard_summary, write_dataset, write_shard
from dsasr.testing.dataloader_fuzz import digest

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


def test_ranges_wholes_and_what_is_not_there(bucket, tmp_path) -> None:
    bucket.objects["b/x.tar"] = BODY
    read = sources(tmp_path)
    assert read.read("s3://b/x.tar", 100, 50) == BODY[100:150]
    assert read.read_file("s3://b/x.tar") == BODY
    with pytest.raises(ShardMissing):
        read.read_file("s3://b/none.json")
    with pytest.raises(ShardReadError, match=r"s3://b/none\.tar.*does not exist"):
        read.read("s3://b/none.tar", 0, 10)
    for offset in (len(BODY) - 5, len(BODY) + 5):
        with pytest.raises(ShardTruncated):
            read.read("s3://b/x.tar", offset, 10)
    assert sources(tmp_path, cache_gb=1.0).read("s3://b/x.tar", 7, 9) == BODY[7:16]


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


def test_a_stream_from_s3_is_the_stream_from_disk(bucket, tmp_path) -> None:
    """With workers: what fsspec caches in the parent must not be used after the fork."""
    folder, rows = tmp_path / "local", []
    for number in range(3):
        samples = []
        for i in range(4):
            wave = np.random.default_rng(4 * number + i).standard_normal(6000 + 900 * i) * 0.1
            buffer = io.BytesIO()
            soundfile.write(buffer, wave, 16_000, format="FLAC", subtype="PCM_16")
            said = {"text": "x", "lang": "en", "speaker": "s", "duration": len(wave) / 16_000}
            samples.append(PackedSample(f"{number}-{i}", "flac", buffer.getvalue(), said))
        path = folder / f"{number:06d}.tar"
        path.parent.mkdir(exist_ok=True)
        rows.append(shard_summary(path, write_shard(path, samples)))
    write_dataset(folder, rows, 1)
    for path in folder.iterdir():
        bucket.objects[f"b/set/{path.name}"] = path.read_bytes()
    digests, keys = {}, Counter()
    for shards in (str(folder), "s3://b/set/"):
        config = DataLoaderConfig(
            batch=BatchConfig(frames=300),
            num_workers=1,
            source=StorageConfig(cache=str(tmp_path / "cache"), backoff=0.01, timeout=5.0),
        )
        with StreamingDataLoader(config, datasets=[DatasetConfig("d", shards)], epochs=1) as stream:
            batches = list(stream)
        digests[shards] = [digest(b) for b in batches]
        keys.update(k for b in batches for k in b.keys)
    assert digests[str(folder)] == digests["s3://b/set/"] and set(keys.values()) == {2}
    assert len(keys) == 12 and json.loads((folder / "dataset.json").read_text())["samples"] == 12
    assert tarfile.is_tarfile(folder / "000000.tar")
