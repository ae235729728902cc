"""Shards from folders, patterns, HTTP servers that fail, stall and truncate, and a cache."""

from __future__ import annotations

import base64
import contextlib
import fcntl
import io
import json
import multiprocessing
import os
import re
import tarfile
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import soundfile

from dsasr.data.dataloader.bucketing import BatchConfig
from dsasr.data.dataloader.dataloader import DataLoaderConfig, DatasetConfig, StreamingDataLoader
from dsasr.data.shards import storage
from dsasr.data.shards.index import build_index
from dsasr.data.shards.index_cache import load_or_build_index
from dsasr.data.shards.storage import (
    ShardMissing,
    ShardReadError,
    ShardStorage,
    ShardTruncated,
    StorageConfig,
    _locked,
    expand_braces,
    is_remote,
)
from dsasr.data.shards.writer import PackedSample, write_shard
from dsasr.testing.dataloader_fuzz import digest
from dsasr.utils.errors import UserError

BODY = bytes(i * 7 % 251 for i in range(200_000))


class Server(ThreadingHTTPServer):
    """Serves ``files``; ``faults`` are used up one per request: 503, stall, cut, drop."""

    daemon_threads = True

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files, self.faults, self.requests = files, [], []
        self.authorizations: list[str | None] = []
        self.redirects: dict[str, str] = {}
        self.ranges = True
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        server = self.server
        server.requests.append((self.path, self.headers.get("Range")))
        server.authorizations.append(self.headers.get("Authorization"))
        if target := server.redirects.get(self.path.lstrip("/")):
            self.send_response(302)
            self.send_header("Location", target)
            self.end_headers()
            return
        fault = server.faults.pop(0) if server.faults else None
        if isinstance(fault, int):
            self.send_error(fault)
            return
        if fault == "drop":
            self.close_connection = True
            return
        body, status = server.files.get(self.path.lstrip("/")), 200
        if body is None:
            self.send_error(404)
            return
        span = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")
        if span and server.ranges:
            if int(span[1]) >= len(body):
                self.send_error(416)
                return
            body, status = body[int(span[1]) : int(span[2]) + 1], 206
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if fault == "stall":
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            time.sleep(1.5)
            return
        if fault == "cut":
            body = body[: len(body) // 2]
        with contextlib.suppress(OSError):
            self.wfile.write(body)


@pytest.fixture
def server():
    one = Server({"a.tar": BODY, "b.tar": BODY[::-1]})
    thread = threading.Thread(target=one.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield one
    one.shutdown()
    one.server_close()


def sources(tmp_path: Path, **kwargs) -> ShardStorage:
    defaults = {"cache": str(tmp_path / "cache"), "backoff": 0.01, "timeout": 0.3, "attempts": 4}
    return ShardStorage(StorageConfig(**{**defaults, **kwargs}))


@pytest.mark.parametrize(
    "faults",
    [[], [503], ["drop"], ["stall"], ["cut"], [500, "cut", "drop"], ["stall", 429]],
    ids=lambda f: "+".join(map(str, f)) or "none",
)
def test_http_ranges_survive_a_bad_server(server, tmp_path, faults) -> None:
    server.faults = list(faults)
    read = sources(tmp_path)
    assert read.read(f"{server.url}/a.tar", 1000, 5000) == BODY[1000:6000]
    assert len(server.requests) == len(faults) + 1
    assert {r for _, r in server.requests} == {"bytes=1000-5999"}
    assert read.bytes == 5000


def test_two_members_cost_one_request_where_they_lie_near(server, tmp_path) -> None:
    local = tmp_path / "s.tar"
    local.write_bytes(BODY)
    read, url = sources(tmp_path), f"{server.url}/a.tar"
    for one, two in (((512, 900), (2048, 70)), ((2048, 70), (512, 900))):
        want = BODY[one[0] : sum(one)], BODY[two[0] : sum(two)]
        assert read.read_two(url, one, two) == read.read_two(str(local), one, two) == want
    assert len(server.requests) == 2
    assert read.read_two(url, (0, 5), (100_000, 5)) == (BODY[:5], BODY[100_000:100_005])
    assert len(server.requests) == 4


def test_a_server_that_stays_bad_ends_in_a_named_error(server, tmp_path) -> None:
    server.faults = [503] * 9
    url = f"{server.url}/a.tar"
    with pytest.raises(ShardReadError) as caught:
        sources(tmp_path).read(url, 0, 10)
    error = caught.value
    assert (error.url, error.attempts) == (url, 4) and "503" in error.cause
    assert str(error) == f"cannot read {url} after 4 attempts: {error.cause}"
    import pickle

    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_a_closed_port_a_refusal_and_a_missing_file_are_distinguished(server, tmp_path) -> None:
    read = sources(tmp_path, attempts=2)
    with pytest.raises(ShardReadError, match=r"after 2 attempts.*refused"):
        read.read("http://127.0.0.1:9/a.tar", 0, 10)
    server.faults = [403]
    with pytest.raises(ShardReadError, match=r"after 1 attempt: HTTP 403"):
        read.read(f"{server.url}/a.tar", 0, 10)
    with pytest.raises(ShardMissing):
        read.read_file(f"{server.url}/none.json")
    for gone in (f"{server.url}/none.tar", str(tmp_path / "none.tar")):
        with pytest.raises(ShardReadError, match="does not exist"):
            read.read(gone, 0, 1)


def test_back_off_doubles(server, tmp_path, monkeypatch) -> None:
    slept = []
    monkeypatch.setattr(time, "sleep", slept.append)
    server.faults = [503] * 4
    with pytest.raises(ShardReadError):
        sources(tmp_path, backoff=0.5).read(f"{server.url}/a.tar", 0, 10)
    assert slept == [0.5, 1.0, 2.0]


def test_a_read_past_the_end_is_truncated_not_retried(server, tmp_path) -> None:
    local = tmp_path / "s.tar"
    local.write_bytes(BODY)
    read = sources(tmp_path)
    for url in (str(local), f"{server.url}/a.tar"):
        assert read.read(url, len(BODY) - 10, 10) == BODY[-10:]
        for offset in (len(BODY) - 5, len(BODY) + 50):
            with pytest.raises(ShardTruncated, match="of 10 bytes"):
                read.read(url, offset, 10)
    assert len(server.requests) == 3


def test_a_server_without_ranges_needs_the_cache(server, tmp_path) -> None:
    server.ranges = False
    url = f"{server.url}/a.tar"
    with pytest.raises(UserError, match=r"source\.cache_gb"):
        sources(tmp_path).read(url, 10, 5)
    assert sources(tmp_path, cache_gb=1.0).read(url, 10, 5) == BODY[10:15]


def test_the_cache_downloads_once_and_whole_or_not_at_all(server, tmp_path) -> None:
    server.faults = ["cut", "stall"]
    read = sources(tmp_path, cache_gb=1.0)
    for offset in (0, 100, 150_000):
        assert read.read(f"{server.url}/a.tar", offset, 50) == BODY[offset : offset + 50]
    assert len(server.requests) == 3  # two failures, one download
    cached = [p for p in (tmp_path / "cache" / "shards").iterdir() if not p.name.endswith(".lock")]
    assert [p.stat().st_size for p in cached] == [len(BODY)]


def test_the_cache_stays_under_its_limit_and_keeps_what_is_used(server, tmp_path) -> None:
    server.files = {f"{i}.tar": bytes([i]) * 100_000 for i in range(6)}
    read = sources(tmp_path, cache_gb=3.5e-4)
    for i in (0, 1, 2, 0, 3, 0, 4):
        assert read.read(f"{server.url}/{i}.tar", 5, 3) == bytes([i]) * 3
        time.sleep(0.01)
    cached = list((tmp_path / "cache" / "shards").glob("*.tar"))
    assert sum(p.stat().st_size for p in cached) <= 350_000
    before = len(server.requests)
    read.read(f"{server.url}/0.tar", 0, 1)
    assert len(server.requests) == before, "the shard in use was evicted"


def test_a_shard_that_leaves_the_cache_before_it_is_opened_is_fetched_again(
    server, tmp_path, monkeypatch
) -> None:
    """A cache too small for its processes: another one evicts what this one has just downloaded."""
    read, url = sources(tmp_path, cache_gb=1.0), f"{server.url}/a.tar"
    cached, gone = read._cached, []

    def evicted(url: str) -> str:
        path = cached(url)
        if len(gone) < 2:
            gone.append(os.unlink(path))
        return path

    monkeypatch.setattr(read, "_cached", evicted)
    assert read.read(url, 10, 5) == BODY[10:15] and len(gone) == 2 == len(server.requests) - 1
    monkeypatch.setattr(read, "_cached", lambda url: str(tmp_path / "gone"))
    with pytest.raises(ShardReadError, match=r"4 attempts.*raise source\.cache_gb"):
        read.read(url, 10, 5)


def test_what_a_killed_download_left_is_removed_in_time(server, tmp_path) -> None:
    folder = tmp_path / "cache" / "shards"
    folder.mkdir(parents=True)
    old, new = folder / ".x.tar.1.tmp", folder / ".x.tar.2.tmp"
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - 7200,) * 2)
    sources(tmp_path, cache_gb=1.0).read(f"{server.url}/a.tar", 0, 1)
    assert new.exists() and not old.exists()


def test_a_fork_does_not_keep_a_lock(tmp_path) -> None:
    """A worker forked while the sampler's thread downloads has the lock's file, not the lock."""
    lock = tmp_path / "lock"
    locked, release = threading.Event(), threading.Event()

    def lock_until_release() -> None:
        with _locked(lock):
            locked.set()
            release.wait(10)

    thread = threading.Thread(target=lock_until_release)
    thread.start()
    locked.wait(10)
    process = multiprocessing.get_context("fork").Process(target=time.sleep, args=(20,))
    process.start()
    release.set()
    thread.join()
    handle = os.open(lock, os.O_RDWR)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.close(handle)
        process.kill()
        process.join()


def _fetch(url: str, folder: str, queue) -> None:
    read = ShardStorage(StorageConfig(cache=folder, cache_gb=1.0))
    queue.put(read.read(url, 7, 9))


def test_processes_share_one_download(server, tmp_path) -> None:
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    args = (f"{server.url}/a.tar", str(tmp_path / "cache"), queue)
    processes = [context.Process(target=_fetch, args=args) for _ in range(4)]
    for process in processes:
        process.start()
    assert [queue.get(timeout=20) for _ in processes] == [BODY[7:16]] * 4
    for process in processes:
        process.join()
    assert len(server.requests) == 1


@pytest.mark.parametrize("cache_gb", [0.0, 1.0])
def test_a_stream_from_a_bad_server_is_the_stream_from_disk(server, tmp_path, cache_gb) -> None:
    """Every third request fails, stalls, is cut or refused; indexes are made on the way."""
    folder, keys = tmp_path / "local", []
    folder.mkdir()
    for number in range(3):
        with tarfile.open(folder / f"s-{number}.tar", "w") as tar:
            for i in range(5):
                keys.append(f"k{number}{i}")
                wave = np.random.default_rng(len(keys)).standard_normal(5000 + 900 * i) * 0.1
                audio = io.BytesIO()
                soundfile.write(audio, wave, 16_000, format="FLAC")
                said = {"text": "x", "lang": "en", "speaker": "s", "duration": len(wave) / 16_000}
                for kind, data in (("flac", audio.getvalue()), ("json", json.dumps(said).encode())):
                    info = tarfile.TarInfo(f"{keys[-1]}.{kind}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    server.files = {path.name: path.read_bytes() for path in folder.glob("*.tar")}
    digests = {}
    for shards in (f"{folder}/s-{{0..2}}.tar", f"{server.url}/s-{{0..2}}.tar"):
        server.faults = [x for fault in (503, "cut", "drop", "stall") for x in (fault, "", "")]
        settings = {"cache": str(tmp_path / "cache"), "backoff": 0.01, "timeout": 0.3}
        config = DataLoaderConfig(
            batch=BatchConfig(frames=150),
            num_workers=2,
            source=StorageConfig(cache_gb=cache_gb, **settings),
        )
        with StreamingDataLoader(config, datasets=[DatasetConfig("d", shards)], epochs=2) as stream:
            batches = list(stream)
        digests[shards] = [digest(batch) for batch in batches]
        seen = Counter(key for batch in batches for key in batch.keys)
        assert seen == Counter(keys * 2) and not any(batch.bad for batch in batches)
    assert len(set(map(tuple, digests.values()))) == 1
    assert len(server.faults) < 12, "the server was asked"


def test_s3_and_others_go_through_fsspec(tmp_path) -> None:
    fsspec = pytest.importorskip("fsspec")
    memory = fsspec.filesystem("memory")
    memory.pipe("/bucket/x.tar", BODY)
    read = sources(tmp_path)
    url = "memory://bucket/x.tar"
    assert read.read(url, 100, 50) == BODY[100:150]
    assert read.read_file(url) == BODY
    assert sources(tmp_path, cache_gb=1.0).read(url, 100, 50) == BODY[100:150]
    with pytest.raises(ShardMissing):
        read.read_file("memory://bucket/none.tar")
    with pytest.raises(ShardTruncated):
        read.read(url, len(BODY) - 5, 10)


def test_pipe_only_behind_the_switch(tmp_path) -> None:
    local = tmp_path / "s.tar"
    local.write_bytes(BODY)
    url = f"pipe:cat {local}"
    for act in (lambda s: s.resolve(url), lambda s: s.read(url, 0, 1)):
        with pytest.raises(UserError, match="allow_pipe"):
            act(sources(tmp_path))
    allowed = sources(tmp_path, allow_pipe=True, attempts=1)
    assert allowed.resolve(url).shards == [url]
    assert allowed.read(url, 3, 4) == BODY[3:7]
    with pytest.raises(ShardReadError, match="ended with 3"):
        allowed.read("pipe:exit 3", 0, 1)


def test_braces() -> None:
    assert list(expand_braces("a-{008..011}.tar")) == [f"a-{i:03d}.tar" for i in range(8, 12)]
    assert list(expand_braces("{x,y}-{1..2}")) == ["x-1", "x-2", "y-1", "y-2"]
    assert list(expand_braces("plain")) == ["plain"]
    for wrong, message in (("{5..1}", "backwards"), ("{abc}", "neither")):
        with pytest.raises(UserError, match=message):
            list(expand_braces(wrong))
    assert is_remote("s3://x") and is_remote("http://x")
    assert not is_remote("/x") and not is_remote("file:///x") and not is_remote("pipe:cat x")


def dataset(folder: Path, names: list[str], **over) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_bytes(b"x")
    data = {
        "version": 1,
        "shards": [{"name": n, "samples": 3, "seconds": 9.0, "bytes": 1} for n in names],
        "samples": 3 * len(names),
        "hours": 0.5,
        "langs": {"en": {"samples": 3, "hours": 0.5}},
        "speakers": 1,
    }
    (folder / "dataset.json").write_text(json.dumps({**data, **over}))
    return folder


def test_resolving_names(tmp_path, server) -> None:
    one = dataset(tmp_path / "one", ["s-0.tar", "s-1.tar"])
    two = dataset(tmp_path / "two", ["t-0.tar"])
    read = sources(tmp_path)
    shard_list = read.resolve(str(one))
    assert shard_list.shards == [str(one / "s-0.tar"), str(one / "s-1.tar")]
    assert shard_list.counts.tolist() == [3, 3] and shard_list.langs == {"en": 0.5}
    both = read.resolve([str(one), str(two / "dataset.json")])
    assert len(both.shards) == 3 and both.hours == 1.0 and both.langs == {"en": 1.0}
    assert read.resolve(str(one / "s-{0..1}.tar")).shards == shard_list.shards
    assert read.resolve(str(one / "*.tar")).shards == shard_list.shards
    assert read.resolve(f"file://{one}/s-0.tar").shards == shard_list.shards[:1]
    assert read.resolve(f"file://{one}").shards == shard_list.shards
    assert read.resolve(f"{server.url}/{{a,b}}.tar").shards == [
        f"{server.url}/a.tar",
        f"{server.url}/b.tar",
    ]
    server.files["set/dataset.json"] = (one / "dataset.json").read_bytes()
    assert read.resolve(f"{server.url}/set/").shards[0] == f"{server.url}/set/s-0.tar"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nothing.tar", "there is no shard"),
        ([], "no shard is named"),
        ("none-*.tar", "no shard matches"),
        ("empty", "no dataset.json"),
        ("broken", "is not a dataset.json"),
        ("escape", "not plain"),
        (["one/s-0.tar", "one/s-0.tar"], "same shard twice"),
        (["one/s-0.tar", "twin/s-0.tar"], "same file name"),
    ],
)
def test_wrong_names_are_user_errors(tmp_path, spec, message) -> None:
    (tmp_path / "empty").mkdir()
    dataset(tmp_path / "one", ["s-0.tar"])
    dataset(tmp_path / "twin", ["s-0.tar"])
    dataset(tmp_path / "broken", ["s-0.tar"], shards=[{"file": 1}])
    dataset(tmp_path / "escape", ["s.tar"], shards=[{"name": "../s.tar", "samples": 1}])
    names = [spec] if isinstance(spec, str) else spec
    assert sources(tmp_path).resolve(str(tmp_path / "one")).shards
    paths = [str(tmp_path / name) for name in names]
    with pytest.raises(UserError, match=message):
        sources(tmp_path).resolve(paths[0] if isinstance(spec, str) else paths)


def test_many_files_keep_few_open(tmp_path) -> None:
    paths = []
    for i in range(100):
        paths.append(tmp_path / f"{i}.tar")
        paths[-1].write_bytes(BODY[i : i + 100])
    read = sources(tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    for i, path in enumerate(paths):
        assert read.read(str(path), 10, 5) == BODY[i + 10 : i + 15]
    assert len(os.listdir("/proc/self/fd")) - before <= 65
    read.close()
    assert len(os.listdir("/proc/self/fd")) - before <= 1


def test_a_dataset_without_one_of_its_shards_is_refused(tmp_path) -> None:
    folder = dataset(tmp_path / "one", ["s-0.tar", "s-1.tar"])
    (folder / "s-1.tar").unlink()
    with pytest.raises(UserError, match=r"1 shards that are not there, such as s-1\.tar"):
        sources(tmp_path).resolve(str(folder))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"shards": ' + "[" * 100_000, "nests too deep"),
        ('{"shards": 3, "hours": 1}', "is not a dataset.json"),
        (
            '{"shards": [], "hours": 1, "langs": {"a\x1b[2J": {"hours": 1}}}',
            "is not a dataset.json",
        ),
        ('{"shards": [], "hours": 1, "langs": {"e/n": {"hours": 1}}}', "language"),
        ("[]", "is not a dataset.json"),
    ],
)
def test_a_damaged_dataset_json_is_one_line(tmp_path, content, message) -> None:
    (tmp_path / "dataset.json").write_text(content)
    with pytest.raises(UserError, match=message) as error:
        sources(tmp_path).resolve(str(tmp_path))
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


def test_a_file_without_an_end_is_refused(tmp_path, server, monkeypatch) -> None:
    monkeypatch.setattr(storage, "MAX_FILE", 100_000)
    with pytest.raises(UserError, match=r"a\.tar has more than 100,000 bytes"):
        sources(tmp_path).read_file(f"{server.url}/a.tar")
    with pytest.raises(UserError, match="more than 100,000 bytes"):
        sources(tmp_path).read_file("/dev/zero")


@pytest.mark.parametrize(
    "name", ["{0..99999999}.tar", "{0..999}{0..999}{0..999}.tar", "{0..9999999999999999999999}.tar"]
)
def test_braces_that_stand_for_too_much_are_refused(name) -> None:
    with pytest.raises(UserError, match="more than 1,000,000 shards"):
        next(expand_braces(name))
    assert len(list(expand_braces("{0..9}{a,b}{00..99}.tar"))) == 2000


def test_user_and_password_of_a_url(tmp_path, server, monkeypatch) -> None:
    host = server.url.removeprefix("http://")
    monkeypatch.setenv("SHARD_PASSWORD", "p@ss")
    url = sources(tmp_path).resolve(f"http://me:${{SHARD_PASSWORD}}@{host}/a.tar").shards[0]
    assert sources(tmp_path).read(url, 5, 10) == BODY[5:15]
    assert server.authorizations[-1] == "Basic " + base64.b64encode(b"me:p@ss").decode()
    with pytest.raises(ShardReadError) as error:
        sources(tmp_path).read(f"http://me:p%40ss@{host}/none.tar", 0, 1)
    assert "p%40ss" not in str(error.value) and f"http://me:***@{host}/none.tar" in str(error.value)
    with pytest.raises(UserError, match="neither a variable NONE nor NONE_FILE"):
        sources(tmp_path).resolve(f"http://me:${{NONE}}@{host}/a.tar")


def test_a_signed_shard_has_its_index_built(tmp_path, server) -> None:
    local = tmp_path / "s.tar"
    write_shard(local, [PackedSample("k", "flac", b"audio", {"text": "x", "duration": 1.0})])
    server.files["s.tar?sig=S3CRET"] = local.read_bytes()
    server.faults = [403]  # for the index beside it, which the signature does not cover
    read = sources(tmp_path, cache_gb=1)
    index = load_or_build_index(read, f"{server.url}/s.tar?sig=S3CRET")
    assert index.dump() == build_index(local).dump() and len(index) == 1
    assert [path for path, _ in server.requests] == ["/s.index.json", "/s.tar?sig=S3CRET"]
    cached = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert cached and not any(b"S3CRET" in bytes(p) + p.read_bytes() for p in cached)
    server.faults = [403]
    with pytest.raises(ShardReadError, match="HTTP 403"):
        load_or_build_index(read, f"{server.url}/other.tar")


def test_a_redirect_to_a_file_is_not_followed(tmp_path, server) -> None:
    (tmp_path / "secret").write_text("secret")
    server.redirects["x.tar"] = f"file://{tmp_path}/secret"
    with pytest.raises(ShardReadError):
        sources(tmp_path, attempts=1).read_file(f"{server.url}/x.tar")
