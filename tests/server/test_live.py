"""Live streams over a WebSocket: texts, company, and clients that misbehave."""

from __future__ import annotations

import contextlib
import json
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from dsasr.server.live import Pace

pytest.importorskip("websockets")
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

FINISH = json.dumps({"type": "finish"})


def tone(code: int, seconds: float) -> bytes:
    return np.full(int(16000 * seconds), code, "<i2").tobytes()


def open_stream(server, query: str = "", **options):
    url = f"ws://127.0.0.1:{server.port}/v1/audio/stream{query}"
    return connect(url, open_timeout=20, compression=None, **options)


def rest(client) -> list[dict]:
    """All messages until the connection ends."""
    messages = []
    try:
        while True:
            messages.append(json.loads(client.recv(timeout=20)))
    except ConnectionClosed:
        return messages


def spoken(server, code: int, seconds: float = 2.5, query: str = "") -> list[dict]:
    with open_stream(server, query) as client:
        with contextlib.suppress(ConnectionClosed):
            for _ in range(int(seconds * 10)):
                client.send(tone(code, 0.1))
                time.sleep(0.005)
            client.send(FINISH)
        return rest(client)


def test_partial_and_final_texts_come_in_order(serving):
    messages = spoken(serving(), 5)
    kinds = [message["type"] for message in messages]
    assert kinds[0] == "ready" and kinds[-2:] == ["final", "done"]
    assert set(kinds[1:-2]) == {"partial"}
    assert messages[0] == {"type": "ready", "rate": 16000, "chunk_ms": 1000}
    assert messages[-2]["text"] == "5" and messages[-1]["seconds"] == 2.5


def test_a_stream_says_what_is_spoken(serving):
    server = serving()
    assert spoken(server, 5, query="?language=zh")[-2]["text"] == "5 zh"
    (error,) = spoken(server, 5, query="?language=fr")
    assert error["code"] == "unknown_language" and "give one of en, zh" in error["message"]


def test_many_streams_are_recognized_together_and_not_mixed_up(serving):
    server = serving()
    server.streams.pause = 0.02
    with ThreadPoolExecutor(12) as pool:
        heard = list(pool.map(lambda code: spoken(server, code), range(1, 13)))
    for code, messages in enumerate(heard, 1):
        assert {m["text"] for m in messages if "text" in m} == {str(code)}
        assert messages[-1]["type"] == "done"
    assert max(server.streams.together) > 1


@pytest.mark.parametrize(
    "message,code",
    [
        ("hello", "not_audio"),
        ('{"type": "start"}', "not_audio"),
        (b"\x01\x02\x03", "odd_bytes"),
        (b"RIFF....WAVE", "not_pcm"),
        (bytes((1 << 20) + 2), "message_too_large"),
        (tone(666, 0.1), "bad_audio"),
        (tone(667, 0.1), "internal"),
    ],
)
def test_what_is_no_audio_is_named_and_harms_no_other(serving, message, code):
    server = serving()
    with open_stream(server) as other, open_stream(server) as client:
        other.send(tone(8, 0.5))
        client.send(message)
        messages = rest(client)
        assert messages[-1]["type"] == "error" and messages[-1]["code"] == code
        assert messages[-1]["message"]
        other.send(tone(8, 0.7))
        other.send(FINISH)
        assert [m["text"] for m in rest(other) if m["type"] == "final"] == ["8"]


def test_a_client_that_stops_or_leaves_frees_its_place(serving):
    server = serving(idle_seconds=0.4, streams=1)
    with open_stream(server) as silent:
        silent.send(tone(1, 0.1))
        assert rest(silent)[-1]["code"] == "idle"
    client = open_stream(server)
    client.send(tone(1, 0.1))
    with open_stream(server) as second:
        assert rest(second)[-1]["code"] == "too_many_streams"
    client.socket.close()  # without a goodbye
    deadline = time.monotonic() + 10
    while True:
        messages = spoken(server, 4, 0.3)
        if messages[-1]["type"] == "done":
            break
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert [m["text"] for m in messages if m["type"] == "final"] == ["4"]


def test_a_flood_is_read_as_fast_as_it_is_recognized(serving):
    server = serving(ahead_seconds=1.0)
    server.streams.pause = 0.05
    with open_stream(server) as flood:
        for _ in range(40):
            flood.send(tone(2, 0.5))
        flood.send(FINISH)
        messages = rest(flood)
    assert [m["code"] for m in messages if m["type"] == "warning"] == ["too_fast"]
    assert messages[-1] == {"type": "done", "seconds": 20.0}
    with open_stream(serving(messages=50)) as chatter:
        with contextlib.suppress(ConnectionClosed):
            for _ in range(60):
                chatter.send(tone(2, 0.001))
        assert rest(chatter)[-1]["code"] == "too_many_messages"


def test_a_stream_that_is_too_long_ends(serving):
    server = serving(stream_seconds=1.0)
    with open_stream(server) as client:
        client.send(tone(2, 1.5))
        assert rest(client)[-1]["code"] == "too_long"


def test_another_rate_is_refused_where_it_is_declared(serving):
    with open_stream(serving(), "?rate=8000") as client:
        (message,) = rest(client)
        assert message["code"] == "rate" and "resample" in message["message"]


def test_another_rate_shows_in_the_pace():
    def judged(speed: float) -> bool:
        pace = Pace()
        return any(pace.wrong_rate(0.1 * speed, 0.1 * i + 0.01 * (i % 3)) for i in range(200))

    assert judged(0.5) and judged(0.48)
    assert not judged(1.0) and not judged(0.9) and not judged(20) and not judged(0.1)


def test_pages_of_other_sites_may_not_listen(serving):
    server = serving()
    with pytest.raises(InvalidStatus):
        open_stream(server, origin="https://evil.example")
    with open_stream(server, origin=server.url) as client:
        client.send(FINISH)
        assert rest(client)[-1]["type"] == "done"
