"""Uploads: a client's form on disk, its limits checked before anything is queued."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import tempfile
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request

from dsasr.config import nearest
from dsasr.data.audio.files import ERRORS, FFMPEG, SNDFILE, AudioError, open_audio
from dsasr.server.formats import MEDIA
from dsasr.server.settings import ClientError, ServerLimits

FIELDS = (
    "file", "model", "language", "response_format", "prompt", "temperature", "stream",
    "timestamp_granularities[]", "timestamp_granularities",
)  # fmt: skip
_BLOCK = 1 << 16  # samples


@dataclass(frozen=True)
class Upload:
    """A file on this machine, and what the client wants of it."""

    path: Path
    seconds: float
    form: str
    language: str


@asynccontextmanager
async def received(request: Request, limits: ServerLimits, spool: Path):
    """The request's `Upload`, whose file lies in ``spool`` until the end.

    Raises `ClientError` for what is too large, too slow, too long, no audio or no such form.
    """
    limit = int(limits.body_mb * 1e6)
    size = request.headers.get("content-length", "")
    if size.isdigit() and int(size) > limit:
        if "expect" not in request.headers:
            await _drain(request.receive, limit)
        raise _too_large(limits)
    request = Request(request.scope, _limited(request.receive, limit, limits))
    try:
        form = await request.form(max_files=1, max_fields=20)
    except HTTPException as error:
        raise ClientError(400, "bad_form", f"{error.detail}: send multipart/form-data") from None
    except ClientDisconnect:
        raise ClientError(400, "closed_early", "the client closed within its upload") from None
    folder = Path(tempfile.mkdtemp(dir=spool))
    try:
        yield await asyncio.to_thread(_checked, form, limits, folder)
    finally:
        await form.close()
        shutil.rmtree(folder, ignore_errors=True)


async def _drain(receive, limit: int) -> None:
    """Read on for a while: a client that sends before it reads would otherwise get no answer, but
    a broken connection."""
    total, more = 0, True
    with contextlib.suppress(asyncio.TimeoutError):
        while more and total < limit:
            message = await asyncio.wait_for(receive(), 2.0)
            total += len(message.get("body", b""))
            more = message.get("more_body", False)


def _too_large(limits: ServerLimits) -> ClientError:
    return ClientError(
        413, "too_large",
        f"the upload has more than {limits.body_mb:g} MB: send it in parts, or compressed",
    )  # fmt: skip


def _limited(receive, limit: int, limits: ServerLimits):
    """``receive`` that counts the body, and waits ``idle_seconds`` for a part of it."""
    total = 0

    async def counted():
        nonlocal total
        try:
            message = await asyncio.wait_for(receive(), limits.idle_seconds)
        except asyncio.TimeoutError:
            raise ClientError(
                408, "stopped_sending",
                f"no byte of the upload came for {limits.idle_seconds:g} s: send it again",
            ) from None  # fmt: skip
        total += len(message.get("body", b""))
        if total > limit:
            await _drain(receive, limit)
            raise _too_large(limits)
        return message

    return counted


def _checked(form: FormData, limits: ServerLimits, folder: Path) -> Upload:
    for name in form:
        if name not in FIELDS:
            raise ClientError(
                400, "unknown_field", f"there is no field '{name}'{nearest(name, list(FIELDS))}"
            )
    file = form.get("file")
    if not isinstance(file, UploadFile):
        raise ClientError(400, "no_file", "the form has no file: send one in the field 'file'")
    wanted = str(form.get("response_format") or "json")
    if wanted not in MEDIA:
        raise ClientError(
            400, "bad_format", f"response_format is '{wanted}': give one of {', '.join(MEDIA)}"
        )
    if str(form.get("stream") or "false").lower() not in ("false", "0"):
        raise ClientError(
            400, "no_stream", "files are answered whole: for live audio use /v1/audio/stream"
        )
    if str(form.get("prompt") or "").strip():
        raise ClientError(400, "no_prompt", "prompt would have no effect: leave it out")
    if str(form.get("temperature") or "0").rstrip("0").rstrip(".") not in ("", "0"):
        raise ClientError(400, "no_temperature", "nothing is drawn at random: leave it out")
    kind = Path(file.filename or "").suffix.lower().lstrip(".")
    kind = kind if kind in (*SNDFILE, *FFMPEG) else ""
    path = folder / (f"audio.{kind}" if kind else "audio")
    with open(path, "wb") as target:
        shutil.copyfileobj(file.file, target)
    seconds = measured(path, limits.audio_seconds)
    return Upload(path, seconds, wanted, str(form.get("language") or ""))


def measured(path: Path, limit: float) -> float:
    """Seconds of audio, by decoding it: a header may lie. Raises `ClientError`."""
    frames = 0
    try:
        with open_audio(path) as file:
            while block := len(file.read(_BLOCK, dtype="float32", always_2d=True)):
                frames += block
                if frames > limit * file.samplerate:
                    raise ClientError(
                        413, "too_long",
                        f"the file has more than {limit:g} s of audio: send it in parts",
                    )  # fmt: skip
            seconds = frames / file.samplerate
    except AudioError as error:
        raise ClientError(400, "bad_audio", f"the file is no audio: {error.detail}") from None
    except (OSError, *ERRORS) as error:
        reason = getattr(error, "error_string", "") or str(error).replace(str(path), "the file")
        raise ClientError(400, "bad_audio", f"the file is no audio: {reason}") from None
    if not frames:
        raise ClientError(400, "no_samples", "the file has no samples: send some audio")
    return seconds
