"""Serve a model over HTTP: files, live audio, and a page with a microphone.

POST /v1/audio/transcriptions is OpenAI's; ws://…/v1/audio/stream takes raw PCM (16 bits, 16 kHz) as
it is spoken; /healthz and /metrics are for monitoring. There is no password: the server is for this
machine alone, unless --host says otherwise.

examples:
  dsasr serve models/demo
  curl -F file=@talk.mp3 -F response_format=srt http://127.0.0.1:8000/v1/audio/transcriptions
"""

from __future__ import annotations

import ipaddress
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from dsasr.cli.arguments import command_parser, milliseconds, positive
from dsasr.utils.errors import UserError


def main(arguments: Sequence[str] | None = None) -> int:
    parser = command_parser(__name__, __doc__)
    parser.add_argument("model", type=Path, help="an exported folder, or a run folder")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=8000, help="0: any that is free")
    parser.add_argument(
        "--chunk", type=milliseconds, default=640, metavar="640ms",
        help="of live audio, encoded at once",
    )  # fmt: skip
    parser.add_argument("--max-body-mb", type=positive, default=100, help="of an upload")
    parser.add_argument("--max-seconds", type=positive, default=3600, help="of a file's audio")
    parser.add_argument("--max-waiting", type=positive, default=64, help="files in the queue")
    parser.add_argument("--max-streams", type=positive, default=64, help="open at the same time")
    parser.add_argument(
        "--idle-seconds", type=positive, default=30, help="after which a silent client is dropped"
    )
    args = parser.parse_args(arguments)
    listener = listen(args.host, args.port)
    try:
        import uvicorn

        from dsasr.server.app import LOOPBACK, Server
        from dsasr.server.settings import ServerLimits
    except ImportError as error:
        raise UserError(f"serving needs {error.name}: pip install 'dsasr[serve]'") from None
    import torch

    from dsasr.inference.streaming import StreamingConfig, StreamingRecognizer
    from dsasr.utils.library_warnings import silence_library_warnings

    silence_library_warnings()
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(os.cpu_count() or 1)
    recognizer = StreamingRecognizer.from_pretrained(
        args.model, StreamingConfig(chunk_seconds=args.chunk / 1000)
    )
    limits = ServerLimits(
        body_mb=args.max_body_mb,
        audio_seconds=args.max_seconds,
        waiting=args.max_waiting,
        streams=args.max_streams,
        idle_seconds=args.idle_seconds,
    )
    own = is_loopback(args.host)
    server = Server(recognizer, args.model.resolve().name, limits, LOOPBACK if own else ())
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    print(f"serving {args.model} at http://{shown}:{port}   (end with ctrl-c)", flush=True)
    if not own:
        print("whoever reaches this address can use it: there is no password", file=sys.stderr)
    config = uvicorn.Config(
        server.app,
        log_level="warning",
        ws="websockets-sansio",
        ws_max_size=2 * limits.message_bytes,
        timeout_graceful_shutdown=5,
    )
    uvicorn.Server(config).run(sockets=[listener])
    return 0


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises `UserError` where there can be none: before the model is read."""
    if not 0 <= port < 65_536:  # getaddrinfo takes others modulo 65536
        raise UserError(f"--port {port}: give another, from 0 (any that is free) to 65535")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(128)
    except OSError as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(
            f"--host {host} --port {port}: {reason}; give another, or --port 0"
        ) from None
    return listener


def is_loopback(host: str) -> bool:
    """Whether ``host`` can be reached from this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
