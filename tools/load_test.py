"""Load test of ``dsasr serve``: many clients, each answer checked, the server killed on the way.

    python tools/load_test.py MODEL --data SHARDS [--clients 32] [--seconds 60] [--kill]

Half of the clients upload files, the other half speak: streams in real time, 100 ms a message. The
expected text of each recording is what the server answers to one client alone. Counted are answers
that are another recording's (mixed up), that differ otherwise, and that never come (lost). With
``--kill`` the server is ended with SIGKILL in the middle and started again: clients repeat what was
not answered. Latency is that of attempts that nothing interrupted; of a stream from its end to its
final text. Needs dsasr[serve].
"""

from __future__ import annotations

import argparse
import io
import json
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import soundfile
from websockets.exceptions import WebSocketException
from websockets.sync.client import connect

from dsasr.evaluation.eval_sets import read_recordings
from dsasr.utils.errors import Failure, run_tool

RATE, PIECE = 16_000, 1_600
PATIENCE = 300.0  # seconds that a client repeats a request


@dataclass
class Tally:
    """What the clients saw."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    counts: Counter = field(default_factory=Counter)
    seconds: dict[str, list[float]] = field(default_factory=lambda: {"file": [], "stream": []})


class ServerProcess:
    """``dsasr serve`` on a port of its own, which stays the same over restarts."""

    def __init__(self, model: Path):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self._command = [
            sys.executable, "-m", "dsasr.cli", "serve", str(model), "--port", str(self.port),
        ]  # fmt: skip
        self.process = None
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise Failure(f"dsasr serve ended with {self.process.returncode}")
            try:
                with urllib.request.urlopen(self.url("/healthz"), timeout=5):
                    return
            except OSError:
                time.sleep(0.2)
        raise Failure("dsasr serve did not start in time")

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def url(self, path: str, scheme: str = "http") -> str:
        return f"{scheme}://127.0.0.1:{self.port}{path}"


def upload(server: ServerProcess, wave: np.ndarray) -> str:
    """The text of a file. Raises OSError."""
    file, mark = io.BytesIO(), uuid.uuid4().hex
    soundfile.write(file, wave, RATE, format="WAV", subtype="PCM_16")
    head = f'--{mark}\r\ncontent-disposition: form-data; name="file"; filename="a.wav"\r\n\r\n'
    body = head.encode() + file.getvalue() + f"\r\n--{mark}--\r\n".encode()
    kind = {"content-type": f"multipart/form-data; boundary={mark}"}
    request = urllib.request.Request(server.url("/v1/audio/transcriptions"), body, kind)
    with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
        return json.loads(answer.read())["text"]


def speak(server: ServerProcess, wave: np.ndarray, pace: float) -> tuple[str, float]:
    """(the final texts of a stream, seconds from its end to the last of them).

    ``pace``: seconds between two messages of 100 ms. Raises OSError, and TimeoutError.
    """
    samples = np.round(wave.clip(-1, 1) * 32_767).astype("<i2")
    finals: list[str] = []
    try:
        with connect(server.url("/v1/audio/stream", "ws"), compression=None) as client:
            begun = time.monotonic()
            for number, start in enumerate(range(0, len(samples), PIECE)):
                client.send(samples[start : start + PIECE].tobytes())
                time.sleep(max(begun + (number + 1) * pace - time.monotonic(), 0))
            client.send(json.dumps({"type": "finish"}))
            ended = time.monotonic()
            while True:
                message = json.loads(client.recv(timeout=PATIENCE))
                if message["type"] == "final" and message["text"]:
                    finals.append(message["text"])
                elif message["type"] == "done":
                    return " ".join(finals), time.monotonic() - ended
                elif message["type"] == "error":
                    raise OSError(message["message"])
    except WebSocketException as error:
        raise OSError(str(error)) from None


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", nargs="+", required=True)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--recordings", type=int, default=32)
    parser.add_argument("--kill", action="store_true", help="kill -9 in the middle, and restart")
    args = parser.parse_args(arguments)
    recordings, _ = read_recordings(args.data, limit=args.recordings)
    waves = [recording.wave for recording in recordings]
    server = ServerProcess(args.model)
    try:
        expected = {
            "file": [upload(server, wave) for wave in waves],
            "stream": [speak(server, wave, 0.0)[0] for wave in waves],
        }
        tally = run_clients(server, waves, expected, args)
    finally:
        server.kill()
    report = {
        "clients": args.clients, "seconds": args.seconds, "killed": args.kill,
        **{name: tally.counts[name] for name in ("answers", "mixed_up", "differ", "lost", "again")},
    }  # fmt: skip
    for kind, seconds in tally.seconds.items():
        quantiles = np.quantile(seconds, (0.5, 0.95)) if seconds else (0, 0)
        report[f"{kind}_s"] = {"n": len(seconds), "p50": round(float(quantiles[0]), 3),
                               "p95": round(float(quantiles[1]), 3)}  # fmt: skip
    print(json.dumps(report))
    return 1 if tally.counts["mixed_up"] or tally.counts["lost"] else 0


def run_clients(
    server: ServerProcess, waves: list[np.ndarray], expected: dict[str, list[str]], args
) -> Tally:
    tally, end = Tally(), time.monotonic() + args.seconds
    threads = [
        threading.Thread(
            target=client,
            args=("stream" if number % 2 else "file", number, server, waves, expected, end, tally),
        )
        for number in range(args.clients)
    ]
    for thread in threads:
        thread.start()
    if args.kill:
        time.sleep(args.seconds / 2)
        server.kill()
        server.start()
    for thread in threads:
        thread.join()
    return tally


def client(
    kind: str,
    number: int,
    server: ServerProcess,
    waves: list[np.ndarray],
    expected: dict[str, list[str]],
    end: float,
    tally: Tally,
) -> None:
    """One request after the other until the time is over; each is repeated until it is answered."""
    draw = random.Random(number)
    while time.monotonic() < end:
        which = draw.randrange(len(waves))
        begun, tries, text = time.monotonic(), 0, None
        while text is None and time.monotonic() - begun < PATIENCE:
            started, tries = time.monotonic(), tries + 1
            try:
                if kind == "file":
                    text, seconds = upload(server, waves[which]), None
                else:
                    text, seconds = speak(server, waves[which], PIECE / RATE)
            except (OSError, TimeoutError, ValueError):
                time.sleep(draw.uniform(0.2, 1.0))
            seconds_taken = time.monotonic() - started
        with tally.lock:
            if text is None:
                tally.counts["lost"] += 1
                continue
            tally.counts["answers"] += 1
            tally.counts["again"] += tries - 1
            if tries == 1:
                tally.seconds[kind].append(seconds_taken if seconds is None else seconds)
            if text != expected[kind][which]:
                tally.counts["mixed_up" if text in expected[kind] and text else "differ"] += 1


if __name__ == "__main__":
    sys.exit(run_tool(main))
