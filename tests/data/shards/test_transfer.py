"""What a server sends must match the request: anything else is read again, and never kept."""

from __future__ import annotations

import io
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from dsasr.data.shards.index_cache import load_or_build_index
from dsasr.data.shards.storage import ShardReadError, ShardStorage, StorageConfig

PAGE = b"<!DOCTYPE html><html><body>Please sign in</body></html>" * 40


def tar_bytes() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for i in range(3):
            data = b'{"text": "x"}' + b" " * 3000
            info = tarfile.TarInfo(f"k{i}.json")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


TAR = tar_bytes()


class Server(ThreadingHTTPServer):
    """Answers each GET with the first of ``faults`` that is left, then with ``body``."""

    daemon_threads = True

    def __init__(self) -> None:
        self.body, self.faults, self.gets = TAR, [], 0
        super().__init__(("127.0.0.1", 0), Answer)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/x.tar"


class Answer(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.send_error(405)  # as where only GET is signed

    def do_GET(self) -> None:
        self.server.gets += 1
        fault = self.server.faults.pop(0) if self.server.faults else ""
        body, status, headers = self.server.body, 200, {}
        if "Range" in self.headers:
            first, last = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
            shift = 7 if fault == "shifted" else 0
            status, total = 206, len(body)
            body = body[first + shift : last + 1 + shift]
            place = f"bytes {first + shift}-{first + shift + len(body) - 1}/{total}"
            if fault != "placeless":
                headers["Content-Range"] = place
        headers["Content-Length"] = str(len(body))
        if fault in ("page", "typed page"):
            body, status = PAGE, 200
            headers = {"Content-Length": str(len(PAGE))}
            headers |= {"Content-Type": "text/html; charset=utf-8"} if fault != "page" else {}
        if fault.endswith("without a length"):
            del headers["Content-Length"]  # HTTP/1.0: the end of the connection is the end
        if fault.startswith("half"):
            body = body[: len(body) // 2]
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def server():
    one = Server()
    threading.Thread(target=one.serve_forever, args=(0.01,), daemon=True).start()
    yield one
    one.shutdown()
    one.server_close()


def storage(tmp_path, **given) -> ShardStorage:
    options = {"cache": str(tmp_path / "cache"), "backoff": 0.001, "timeout": 5.0, "attempts": 3}
    return ShardStorage(StorageConfig(**options | given))


@pytest.mark.parametrize(
    "fault", ["shifted", "placeless", "typed page", "half", "half without a length"]
)
def test_a_range_that_is_another_is_read_again(server, tmp_path, fault):
    server.faults = [fault, fault]
    assert storage(tmp_path).read(server.url, 100, 4000) == TAR[100:4100]
    assert server.gets == 3
    server.faults = [fault] * 3
    with pytest.raises(ShardReadError, match="after 3 attempts"):
        storage(tmp_path).read(server.url, 100, 4000)


@pytest.mark.parametrize("fault", ["page", "typed page", "half", "half without a length"])
def test_a_download_that_is_no_whole_tar_is_never_kept(server, tmp_path, fault):
    server.faults = [fault]
    cached = storage(tmp_path, cache_gb=1.0)
    assert cached.read(server.url, 100, 400) == TAR[100:500]
    assert server.gets == 2
    other = storage(tmp_path / "other", cache_gb=1.0)
    server.faults = [fault] * 3
    with pytest.raises(ShardReadError, match="after 3 attempts"):
        other.read(server.url, 100, 400)
    assert not list((tmp_path / "other").rglob("*.tar"))
    assert other.read(server.url, 100, 400) == TAR[100:500]  # when the server is itself again


def test_a_download_of_unknown_length_that_is_whole_is_kept(server, tmp_path):
    server.faults = ["without a length"]
    assert storage(tmp_path, cache_gb=1.0).read(server.url, 0, len(TAR)) == TAR
    assert server.gets == 1


def test_a_login_page_is_named(server, tmp_path):
    server.body = PAGE
    with pytest.raises(ShardReadError, match=r"no tar but b'<!DOCTYPE html>.*a login page"):
        load_or_build_index(storage(tmp_path), server.url)
