"""The live streams of all clients, recognized together in one thread."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np

from dsasr.data.audio.resampling import RATE
from dsasr.inference.stream_events import Final, Partial
from dsasr.inference.streaming import Stream, StreamingRecognizer
from dsasr.server.metrics import Metrics
from dsasr.server.settings import ClientError, check_language

log = logging.getLogger(__name__)
Event = Partial | Final | Exception | None  # None: after the last


class LiveStream:
    """A client's stream: audio goes in from the network's thread, events come out by ``deliver``,
    which is called from the model's."""

    def __init__(self, batcher: StreamBatcher, stream: Stream, deliver: Callable[[Event], None]):
        self.batcher, self.stream, self.deliver = batcher, stream, deliver
        self.audio: deque[np.ndarray] = deque()
        self.samples_waiting = 0
        self.ending = self.closed = False

    @property
    def ahead_seconds(self) -> float:
        """Audio that came in and was not recognized yet."""
        return self.samples_waiting / RATE

    def push(self, samples: np.ndarray) -> None:
        """int16 or float32 samples."""
        with self.batcher.changed:
            self.audio.append(samples)
            self.samples_waiting += len(samples)
            self.batcher.changed.notify()

    def end(self) -> None:
        """There is no more audio; the last events follow, then None."""
        with self.batcher.changed:
            self.ending = True
            self.batcher.changed.notify()

    def close(self) -> None:
        """The client is gone: what it left is dropped."""
        with self.batcher.changed:
            self.closed = True
            self.batcher.changed.notify()


class StreamBatcher:
    """The thread that takes a step with all streams that have audio."""

    def __init__(self, recognizer: StreamingRecognizer, limit: int, metrics: Metrics):
        self._recognizer, self._limit, self._metrics = recognizer, limit, metrics
        self._streams: list[LiveStream] = []
        self.changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="streams", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def open(self, deliver: Callable[[Event], None], language: str = "") -> LiveStream:
        """A new stream in ``language``. Raises `ClientError` 503 if there are too many, 400 for a
        language that the model was not trained with."""
        check_language(self._recognizer.recognizer, language)
        with self.changed:
            if sum(not live.closed for live in self._streams) >= self._limit:
                raise ClientError(
                    503, "too_many_streams",
                    f"{self._limit} streams are open already: try again later", close=1013,
                )  # fmt: skip
            live = LiveStream(self, self._recognizer.stream(language or None), deliver)
            self._streams.append(live)
            self._metrics.streams.set(len(self._streams))
        return live

    def _run(self) -> None:
        while True:
            with self.changed:
                self.changed.wait_for(self._anything)
                work = []
                for live in self._streams:
                    if live.audio or live.ending:
                        work.append((live, list(live.audio), live.samples_waiting, live.ending))
                        live.audio.clear()
                self._streams = [s for s in self._streams if not (s.closed or s.ending)]
                self._metrics.streams.set(len(self._streams))
            work = [item for item in work if not item[0].closed]
            if work:
                self._step(work)

    def _anything(self) -> bool:
        return any(s.audio or s.ending or s.closed for s in self._streams)

    def _step(self, work: Sequence[tuple[LiveStream, list[np.ndarray], int, bool]]) -> None:
        started, going = time.monotonic(), []
        for live, parts, _, ending in work:
            try:
                for part in parts:
                    live.stream.push(part)
                if ending:
                    live.stream.end()
                going.append(live)
            except Exception as error:  # its client is told; the other streams go on
                live.deliver(error)
        for live, events in zip(going, self._advanced(going), strict=True):
            for event in events:
                self._count(event)
                live.deliver(event)
        self._metrics.stream_batch.observe(len(work))
        self._metrics.stream_step.observe(time.monotonic() - started)
        for live, _, samples, ending in work:
            self._metrics.audio_seconds.labels("stream").inc(samples / RATE)
            with self.changed:
                live.samples_waiting -= samples
            if ending:
                live.deliver(None)

    def _advanced(self, going: Sequence[LiveStream]) -> list[list[Event]]:
        if not going:
            return []
        try:
            return self._recognizer.advance([live.stream for live in going])
        except Exception as error:  # of the model: out of memory and much else
            log.exception("a step of %d streams failed", len(going))
            if len(going) == 1:
                return [[error]]
        # One by one: only the stream at fault fails.
        return [self._advanced([live])[0] for live in going]

    def _count(self, event: Event) -> None:
        if isinstance(event, Partial | Final):
            self._metrics.texts.labels(type(event).__name__.lower()).inc()
