"""The WebSocket for live audio: PCM in, partial and final texts out.

The client sends binary messages of raw mono PCM, 16 bits little-endian at 16 kHz, as they are
recorded, and at the end the text ``{"type": "finish"}``; ``?language=zh`` says what is spoken. It
gets JSON texts:

    {"type": "ready", "rate": 16000, "chunk_ms": 640}
    {"type": "partial", "start": 0.0, "end": 1.28, "text": "the quick bro", "settled": 9}
    {"type": "final", "start": 0.0, "end": 2.4, "text": "the quick brown fox",
     "confidence": 0.93, "no_speech": false, "finished": true, "doubt": [], "heard": -0.02,
     "words": [{"text": "the", "start": 0.12, "end": 0.31, "confidence": 0.98}, …]}
    {"type": "warning", "code": "rate", "message": …}
    {"type": "done", "seconds": 12.8}
    {"type": "error", "code": …, "message": …}      and the connection ends
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import deque
from dataclasses import asdict

import numpy as np
from starlette.websockets import WebSocket, WebSocketDisconnect

from dsasr.data.audio.resampling import RATE
from dsasr.inference.stream_events import Final, Partial
from dsasr.server.metrics import Metrics
from dsasr.server.settings import ClientError, ServerLimits
from dsasr.server.stream_batcher import Event, StreamBatcher
from dsasr.utils.errors import UserError

WATCHED_SECONDS = 8.0  # of a stream's pace, before it is judged


class Pace:
    """How fast a stream's audio comes. A microphone of 8 kHz whose samples are declared as 16 kHz
    fills a second of audio in two: the text would be nonsense."""

    def __init__(self) -> None:
        self._started: float | None = None
        self._seconds, self._judged = 0.0, False
        self._recent: deque[float] = deque()  # times of the last second's messages

    def wrong_rate(self, seconds: float, now: float) -> bool:
        """Whether ``seconds`` more of audio show it; True once at most."""
        if self._started is None:
            self._started = now
            return False
        self._seconds += seconds
        elapsed = now - self._started
        if self._judged or elapsed < WATCHED_SECONDS:
            return False
        self._judged = True
        return 0.4 < self._seconds / elapsed < 0.6

    def messages(self, now: float) -> int:
        """Messages of the last second, this one included."""
        self._recent.append(now)
        while self._recent[0] < now - 1:
            self._recent.popleft()
        return len(self._recent)


async def serve_stream(
    socket: WebSocket, batcher: StreamBatcher, limits: ServerLimits, metrics: Metrics, chunk_ms: int
) -> None:
    """One client's stream, from its start to its end."""
    await socket.accept()
    loop, events = asyncio.get_running_loop(), asyncio.Queue()
    live = None
    try:
        rate = socket.query_params.get("rate", str(RATE))
        if rate != str(RATE):
            raise ClientError(
                400, "rate", f"streams are of {RATE} Hz, not {rate}: resample before sending"
            )
        live = batcher.open(
            lambda event: loop.call_soon_threadsafe(events.put_nowait, event),
            socket.query_params.get("language", ""),
        )
        await _say(socket, {"type": "ready", "rate": RATE, "chunk_ms": chunk_ms})
        reading = asyncio.create_task(_read(socket, live, limits, metrics))
        writing = asyncio.create_task(_write(socket, live, events))
        try:
            done, _ = await asyncio.wait((reading, writing), return_when=asyncio.FIRST_EXCEPTION)
            for task in done:
                task.result()
        finally:
            for task in (reading, writing):
                task.cancel()
            await asyncio.gather(reading, writing, return_exceptions=True)
        await socket.close()
    except ClientError as error:
        metrics.errors.labels(error.code).inc()
        await _refuse(socket, error)
    except WebSocketDisconnect:
        metrics.errors.labels("closed_early").inc()
    finally:
        if live is not None:
            live.close()


async def _read(socket: WebSocket, live, limits: ServerLimits, metrics: Metrics) -> None:
    """Audio in, until the client ends it."""
    pace, seconds, warned = Pace(), 0.0, False
    while True:
        try:
            message = await asyncio.wait_for(socket.receive(), limits.idle_seconds)
        except asyncio.TimeoutError:
            raise ClientError(
                408, "idle",
                f"no audio came for {limits.idle_seconds:g} s: send silence, or finish the stream",
            ) from None  # fmt: skip
        if message["type"] == "websocket.disconnect":
            raise WebSocketDisconnect(message.get("code", 1006))
        now = time.monotonic()
        if pace.messages(now) > limits.messages:
            raise ClientError(
                429, "too_many_messages",
                f"more than {limits.messages} messages in a second: send 20 to 100 ms in each",
            )  # fmt: skip
        data = message.get("bytes")
        if data is None:
            _check_text(message.get("text") or "")
            live.end()
            return
        samples = _samples(data, limits, first=seconds == 0)
        seconds += len(samples) / RATE
        if seconds > limits.stream_seconds:
            raise ClientError(
                413, "too_long",
                f"the stream has more than {limits.stream_seconds:g} s: open another",
            )  # fmt: skip
        live.push(samples)
        if pace.wrong_rate(len(samples) / RATE, now):
            metrics.errors.labels("rate").inc()
            await _say(socket, _RATE_WARNING)
        while live.ahead_seconds > limits.ahead_seconds:
            if not warned:
                warned = True
                metrics.errors.labels("too_fast").inc()
                await _say(socket, _FAST_WARNING)
            await asyncio.sleep(0.02)  # nothing is read: the client has to wait


_RATE_WARNING = {
    "type": "warning",
    "code": "rate",
    "message": f"audio comes at half the speed of {RATE} Hz: it is probably recorded at "
    f"{RATE // 2} Hz, and the text is nonsense; resample before sending",
}
_FAST_WARNING = {
    "type": "warning",
    "code": "too_fast",
    "message": "audio comes faster than it is recognized: it is read more slowly",
}


def _check_text(text: str) -> None:
    """Raise `ClientError` for a text other than the end of the stream."""
    try:
        values = json.loads(text)
    except ValueError:
        values = None
    if not (isinstance(values, dict) and values.get("type") == "finish"):
        raise ClientError(
            400, "not_audio",
            'a text is no audio: send binary PCM, and {"type": "finish"} at the end', close=1003,
        )  # fmt: skip


def _samples(data: bytes, limits: ServerLimits, first: bool) -> np.ndarray:
    if len(data) > limits.message_bytes:
        raise ClientError(
            413, "message_too_large",
            f"a message of {len(data):,} bytes: send at most {limits.message_bytes:,}", close=1009,
        )  # fmt: skip
    if len(data) % 2:
        raise ClientError(
            400, "odd_bytes",
            "a message with an odd number of bytes is no 16-bit PCM: send whole samples",
            close=1003,
        )  # fmt: skip
    if first and data[:4] in (b"RIFF", b"OggS", b"fLaC", b"\x1aE\xdf\xa3"):
        raise ClientError(
            400, "not_pcm",
            "this is a file, not raw PCM: send its samples alone, or the file to "
            "/v1/audio/transcriptions", close=1003,
        )  # fmt: skip
    return np.frombuffer(data, "<i2").astype(np.int16)


async def _write(socket: WebSocket, live, events: asyncio.Queue[Event]) -> None:
    """Texts out, until the stream's last."""
    while (event := await events.get()) is not None:
        if isinstance(event, UserError):
            raise ClientError(400, "bad_audio", str(event))
        if isinstance(event, Exception):
            raise ClientError(500, "internal", "the recognizer failed: try again", close=1011)
        kind = {Partial: "partial", Final: "final"}[type(event)]
        await _say(socket, {"type": kind, **asdict(event)})
    await _say(socket, {"type": "done", "seconds": round(live.stream.seconds, 3)})


async def _say(socket: WebSocket, values: dict) -> None:
    try:
        await socket.send_text(json.dumps(values, ensure_ascii=False))
    except (RuntimeError, OSError):
        raise WebSocketDisconnect(1006) from None


async def _refuse(socket: WebSocket, error: ClientError) -> None:
    try:
        await _say(socket, {"type": "error", "code": error.code, "message": error.message})
        await socket.close(error.close)
    except (WebSocketDisconnect, RuntimeError, OSError):
        pass
