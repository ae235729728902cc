"""The answers of ``POST /v1/audio/transcriptions``, in OpenAI's formats."""

from __future__ import annotations

import json
from typing import Any

from dsasr.inference.recognizer import Segment, Transcription

MEDIA = {
    "json": "application/json",
    "text": "text/plain; charset=utf-8",
    "srt": "application/x-subrip; charset=utf-8",
    "vtt": "text/vtt; charset=utf-8",
    "verbose_json": "application/json",
}


def formatted(transcription: Transcription, form: str, seconds: float, language: str = "") -> str:
    """The body of the answer. ``seconds`` of audio; ``language`` as the client gave it,
    else as the script of the text tells it."""
    if form == "text":
        return transcription.text + "\n"
    if form == "srt":
        return transcription.to_srt()
    if form == "vtt":
        return transcription.to_vtt()
    answer: dict[str, Any] = {"text": transcription.text}
    if form == "verbose_json":
        answer |= {
            "task": "transcribe",
            "language": language or next((s.language for s in transcription.spoken), ""),
            "duration": round(seconds, 3),
            "segments": [_segment(i, s) for i, s in enumerate(transcription.segments)],
        }
        words = [word for s in transcription.segments for word in _words(s)]
        if words:
            answer["words"] = words
    return json.dumps(answer, ensure_ascii=False)


def _segment(number: int, segment: Segment) -> dict[str, Any]:
    return {
        "id": number,
        "start": segment.start,
        "end": segment.end,
        "text": segment.text,
        "confidence": segment.confidence,
        "no_speech": segment.no_speech,
        "finished": segment.finished,
        "doubt": list(segment.doubt),
    }


def _words(segment: Segment) -> list[dict[str, Any]]:
    return [{"word": word.text, "start": word.start, "end": word.end} for word in segment.words]
