"""A server on loopback around stand-ins for the recognizers, whose texts tell what they heard."""

from __future__ import annotations

import json
import threading
import time
import urllib.error
import urllib.request
import uuid
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile

pytest.importorskip("starlette", reason="the server is not installed: pip install 'dsasr[serve]'")
pytest.importorskip("uvicorn")

import uvicorn

from dsasr.inference.recognizer import Segment, Transcription
from dsasr.inference.stream_events import Final, Partial
from dsasr.server.app import Server
from dsasr.server.settings import ServerLimits
from dsasr.utils.errors import UserError


@dataclass
class FileRecognizer:
    """The text of a file is its code; ``pause``: seconds that a batch takes."""

    pause: float = 0.0
    batches: list[int] = field(default_factory=list)

    def check_language(self, lang):
        if lang not in ("", "en", "zh"):
            raise UserError(f"the model was not trained with {lang!r}: give one of en, zh")

    def transcribe_all(self, paths, on_error, lang):
        taken = list(paths)
        time.sleep(self.pause)
        self.batches.append(len(taken))
        for path in taken:
            samples, rate = soundfile.read(path, dtype="int16")
            code = int(np.atleast_1d(samples)[0])
            if code == 666:
                on_error(str(path), UserError(f"{path} is damaged"))
            elif code == 667:
                raise RuntimeError("a fault of the recognizer")
            else:
                end = len(samples) / rate
                text = f"code {code} {lang(str(path))}".rstrip()
                segment = Segment(0.0, end, text, 0.9, False, True, ())
                yield Transcription(str(path), (segment,))


class StreamRecognizer:
    """A partial text each second, and a final one at the end: codes heard, in order."""

    config = SimpleNamespace(chunk_seconds=1.0)

    def __init__(self, files: FileRecognizer):
        self.recognizer, self.together, self.pause = files, [], 0.0

    def stream(self, lang):
        return SimpleStream(lang)

    def advance(self, streams):
        self.together.append(len(streams))
        time.sleep(self.pause)
        return [stream.events() for stream in streams]


class SimpleStream:
    def __init__(self, lang):
        self.lang = lang
        self.heard = np.zeros(0, np.int16)
        self.ended, self.seconds, self.told = False, 0.0, 0

    def push(self, samples):
        if (samples == 666).any():
            raise UserError("the stream's audio is bad")
        self.heard = np.concatenate((self.heard, samples))
        self.seconds = len(self.heard) / 16000

    def end(self):
        self.ended = True

    def events(self):
        if (self.heard == 667).any():
            raise RuntimeError("a fault of the recognizer")
        codes = map(str, dict.fromkeys(self.heard.tolist()))
        text = " ".join([*codes, *filter(None, [self.lang])])
        found = []
        if self.seconds - self.told >= 1:
            self.told = self.seconds
            found.append(Partial(0.0, self.seconds, text, 0))
        if self.ended:
            found.append(Final(0.0, self.seconds, text, 0.9, False, True))
        return found


@dataclass
class Running:
    server: Server
    files: FileRecognizer
    streams: StreamRecognizer
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def get(self, path: str, **headers: str):
        return fetch(urllib.request.Request(self.url + path, headers=headers))

    def post(self, audio: bytes, name: str = "a.wav", headers=None, **fields: str):
        """(status, body) of a transcription."""
        body, kind = form(audio, name, fields)
        head = {"content-type": kind, **(headers or {})}
        path = self.url + "/v1/audio/transcriptions"
        return fetch(urllib.request.Request(path, body, head, method="POST"))

    def error(self, *arguments, **fields) -> tuple[int, str, str]:
        status, body = self.post(*arguments, **fields)
        error = json.loads(body)["error"]
        return status, error["code"], error["message"]


def form(audio: bytes | None, name: str, fields: dict[str, str]) -> tuple[bytes, str]:
    mark = uuid.uuid4().hex
    parts = []
    for key, value in fields.items():
        parts.append(f'--{mark}\r\ncontent-disposition: form-data; name="{key}"\r\n\r\n{value}\r\n')
    body = "".join(parts).encode()
    if audio is not None:
        head = f'--{mark}\r\ncontent-disposition: form-data; name="file"; filename="{name}"\r\n\r\n'
        body += head.encode() + audio + b"\r\n"
    return body + f"--{mark}--\r\n".encode(), f"multipart/form-data; boundary={mark}"


def fetch(request) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def run_app(app):
    """(port, stop) of ``app`` served in a thread."""
    config = uvicorn.Config(
        app, port=0, log_level="warning", ws="websockets-sansio", ws_max_size=1 << 22
    )
    web = uvicorn.Server(config)
    thread = threading.Thread(target=web.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 30
    while not web.started and time.monotonic() < deadline:
        time.sleep(0.01)
    port = web.servers[0].sockets[0].getsockname()[1]

    def stop():
        web.should_exit = True
        thread.join(15)

    return port, stop


@pytest.fixture
def serving():
    """``serving(limit=value, …)``: a `Running` server with these limits."""
    stops = []

    def start(**limits) -> Running:
        files = FileRecognizer()
        streams = StreamRecognizer(files)
        server = Server(streams, "stand-in", ServerLimits(**limits))
        port, stop = run_app(server.app)
        stops.append(stop)
        return Running(server, files, streams, port)

    yield start
    for stop in stops:
        stop()
