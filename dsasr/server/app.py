"""The web application: OpenAI's transcriptions, live streams, a page, health and figures."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from urllib.parse import urlsplit

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.websockets import WebSocket

import dsasr
from dsasr.inference.streaming import StreamingRecognizer
from dsasr.server.file_queue import FileQueue, Job
from dsasr.server.formats import MEDIA, formatted
from dsasr.server.live import serve_stream
from dsasr.server.metrics import Metrics
from dsasr.server.settings import ClientError, ServerLimits, check_language
from dsasr.server.stream_batcher import StreamBatcher
from dsasr.server.uploads import received

PAGE = Path(__file__).parent / "page"
LOOPBACK = ("localhost", "127.0.0.1", "::1")
_HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (
        b"content-security-policy",
        b"default-src 'self'; connect-src 'self' ws: wss:; img-src 'self' data:",
    ),
]

log = logging.getLogger(__name__)


class Server:
    """A recognizer behind HTTP; ``app`` is the ASGI application.

    ``hosts``: names that the server may be called by; empty: any. A web page of another site may
    not use it, by its own name or by one that it makes point here.
    """

    def __init__(
        self,
        recognizer: StreamingRecognizer,
        name: str,
        limits: ServerLimits | None = None,
        hosts: tuple[str, ...] = LOOPBACK,
    ):
        self.name, self.limits = name, limits or ServerLimits()
        self._recognizer = recognizer.recognizer
        self.metrics = Metrics()
        self.files = FileQueue(recognizer.recognizer, self.limits.waiting, self.metrics)
        self.streams = StreamBatcher(recognizer, self.limits.streams, self.metrics)
        self.chunk_ms = round(1000 * recognizer.config.chunk_seconds)
        self._spool = tempfile.TemporaryDirectory(prefix="dsasr-serve-")
        routes = [
            Route("/", self.page),
            Route("/page/{name}", self.page),
            Route("/healthz", self.health),
            Route("/metrics", self.figures),
            Route("/v1/models", self.models),
            Route("/v1/audio/transcriptions", self.transcriptions, methods=["POST"]),
            WebSocketRoute("/v1/audio/stream", self.stream),
        ]
        self.app: ASGIApp = SameSite(Starlette(routes=routes), hosts)

    # -- what clients ask for ----------------------------------------------------------------

    async def transcriptions(self, request: Request) -> Response:
        """OpenAI's POST /v1/audio/transcriptions."""
        try:
            response = await self._transcribed(request)
        except ClientError as error:
            self.metrics.errors.labels(error.code).inc()
            headers = {"retry-after": "5"} if error.status == 429 else None
            response = JSONResponse(error.body(), error.status, headers)
        except Exception:  # the client gets an answer in OpenAI's form all the same
            log.exception("a request failed")
            error = ClientError(500, "internal", "the recognizer failed: try again")
            response = JSONResponse(error.body(), 500)
        self.metrics.requests.labels(str(response.status_code)).inc()
        return response

    async def _transcribed(self, request: Request) -> Response:
        self.files.reserve()
        try:
            async with received(request, self.limits, Path(self._spool.name)) as upload:
                check_language(self._recognizer, upload.language)
                started = time.monotonic()
                job = Job(upload.path, upload.seconds, upload.language)
                self.files.submit(job)
                transcription = await _while_connected(request, job)
                self.metrics.request_seconds.observe(time.monotonic() - started)
                body = formatted(transcription, upload.form, upload.seconds, upload.language)
                return Response(body, media_type=MEDIA[upload.form])
        finally:
            self.files.release()

    async def stream(self, socket: WebSocket) -> None:
        """The WebSocket for live audio."""
        await serve_stream(socket, self.streams, self.limits, self.metrics, self.chunk_ms)

    async def page(self, request: Request) -> Response:
        """The page with a microphone button and a place to drop files."""
        name = request.path_params.get("name", "index.html")
        known = {path.name: path for path in PAGE.iterdir()}
        if name not in known:
            return PlainTextResponse("there is no such page", 404)
        return FileResponse(known[name])

    async def health(self, _request: Request) -> Response:
        """200 while the recognizer's threads run, else 503."""
        well = self.files.alive and self.streams.alive
        values = {"status": "ok" if well else "failed", "model": self.name}
        return JSONResponse(values | {"version": dsasr.__version__}, 200 if well else 503)

    async def figures(self, _request: Request) -> Response:
        """For Prometheus."""
        return Response(generate_latest(self.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    async def models(self, _request: Request) -> Response:
        """OpenAI's GET /v1/models: the one that is served."""
        model = {"id": self.name, "object": "model", "owned_by": "dsasr"}
        return JSONResponse({"object": "list", "data": [model]})


async def _while_connected(request: Request, job: Job):
    """The job's result; a client that has gone cancels it."""
    future = asyncio.wrap_future(job.result)
    while True:
        done, _ = await asyncio.wait({future}, timeout=1.0)
        if done:
            return future.result()
        if await request.is_disconnected():
            future.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await future
            raise ClientError(400, "closed_early", "the client closed before the answer")


class SameSite:
    """Refuses requests under a foreign host's name, and those of other sites' pages."""

    def __init__(self, app: ASGIApp, hosts: tuple[str, ...]):
        self._app, self._hosts = app, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            return await self._app(scope, receive, send)
        headers = {k.decode("latin-1"): v.decode("latin-1") for k, v in scope["headers"]}
        host = headers.get("host", "")
        origin = headers.get("origin")
        named = urlsplit(f"//{host}").hostname or ""
        if self._hosts and named not in self._hosts:
            reason = f"this server is not called {named}: use {self._hosts[0]}"
        elif origin is not None and urlsplit(origin).netloc != host:
            reason = "pages of other sites may not use this server"
        else:
            return await self._app(scope, receive, _with_headers(send))
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008, "reason": reason})
            return None
        error = ClientError(403, "foreign_site", reason)
        return await JSONResponse(error.body(), 403)(scope, receive, send)


def _with_headers(send: Send) -> Callable[[dict], Awaitable[None]]:
    async def sent(message):
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message["headers"], *_HEADERS]}
        await send(message)

    return sent
