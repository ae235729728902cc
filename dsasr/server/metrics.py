"""The server's figures, for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_SECONDS = (0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 300)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """Counters of one server; ``registry`` is what ``/metrics`` shows."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "dsasr_requests",
            "Transcription requests, by HTTP status",
            ["status"],
            registry=registry,
        )
        self.errors = Counter(
            "dsasr_client_errors", "What clients did wrong", ["code"], registry=registry
        )
        self.request_seconds = Histogram(
            "dsasr_request_seconds", "From the whole upload to the answer",
            buckets=_SECONDS, registry=registry,
        )  # fmt: skip
        self.audio_seconds = Counter(
            "dsasr_audio_seconds", "Audio recognized", ["kind"], registry=registry
        )
        self.waiting = Gauge(
            "dsasr_files_waiting", "Files that wait or are transcribed", registry=registry
        )
        self.streams = Gauge("dsasr_streams_open", "Open streams", registry=registry)
        self.file_batch = Histogram(
            "dsasr_files_together", "Files transcribed together", buckets=_SIZES, registry=registry
        )
        self.stream_batch = Histogram(
            "dsasr_streams_together", "Streams in a step", buckets=_SIZES, registry=registry
        )
        self.stream_step = Histogram(
            "dsasr_stream_step_seconds", "A step with all streams that have a chunk",
            buckets=_SECONDS, registry=registry,
        )  # fmt: skip
        self.texts = Counter("dsasr_texts", "Texts sent to streams", ["kind"], registry=registry)
