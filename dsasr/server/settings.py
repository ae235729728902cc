"""What a server allows its clients, and the errors that say so."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dsasr.utils import ranges
from dsasr.utils.errors import UserError
from dsasr.utils.ranges import PositiveFloat, PositiveInt

if TYPE_CHECKING:
    from dsasr.inference.recognizer import Recognizer


@dataclass(frozen=True)
class ServerLimits:
    """A client that exceeds one of these gets an error; other clients are not affected."""

    body_mb: PositiveFloat = 100.0  # of an upload
    audio_seconds: PositiveFloat = 3600.0  # of a file
    waiting: PositiveInt = 64  # files that wait or are transcribed
    streams: PositiveInt = 64  # open at the same time
    stream_seconds: PositiveFloat = 4 * 3600.0  # of audio in a stream
    idle_seconds: PositiveFloat = 30.0  # without audio in a stream, or without a byte of an upload
    ahead_seconds: PositiveFloat = (
        5.0  # of audio that a stream may be ahead; then it is read slower
    )
    message_bytes: PositiveInt = 1 << 20  # of a stream's message
    messages: PositiveInt = 1000  # of a stream in a second

    def __post_init__(self) -> None:
        ranges.check(self)


class ClientError(Exception):
    """What a client did wrong: the HTTP ``status`` or WebSocket ``close`` code that it gets, a
    ``code`` for programs, and a message that names the way out."""

    def __init__(self, status: int, code: str, message: str, close: int = 1008):
        super().__init__(message)
        self.status, self.code, self.message, self.close = status, code, message, close

    def body(self) -> dict:
        """In the form of OpenAI's API."""
        return {
            "error": {
                "message": self.message,
                "type": "invalid_request_error" if self.status < 500 else "server_error",
                "param": None,
                "code": self.code,
            }
        }


def check_language(recognizer: Recognizer, language: str) -> None:
    """Raise `ClientError` for a ``language`` that the model's prompt cannot name."""
    try:
        recognizer.check_language(language)
    except UserError as error:
        raise ClientError(400, "unknown_language", str(error)) from None
