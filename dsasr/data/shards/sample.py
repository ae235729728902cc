"""One sample of a shard: where its bytes lie, and how they are read.

A sample is ``KEY.flac|wav|opus|ogg|mp3`` and ``KEY.json`` (text, lang, speaker, duration; optional
phonemes, alignment; all else becomes meta). `SampleFields` says where other people's shards have
these. Members' names are keys, never paths ("Data is not code").
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from dsasr.data.audio.files import MAX_SECONDS
from dsasr.utils.errors import UserError
from dsasr.utils.names import is_language, is_speaker

EXTENSIONS = ("flac", "wav", "opus", "ogg", "mp3")

Fetch = Callable[[int, int], bytes]  # (offset, size) → bytes; fewer at the end of the tar


DroppedSample = tuple[str, str, str, str]
"""A sample that is left out, and why: cause, shard, key, detail."""


class BadSample(Exception):
    """A sample that cannot be used: ``cause`` in short snake_case, its shard and key, and why."""

    def __init__(self, cause: str, shard: str, key: str, detail: str = ""):
        super().__init__(f"{cause}: {key} in {shard}: {detail}")
        self.cause, self.shard, self.key, self.detail = cause, shard, key, detail

    def __reduce__(self):
        return BadSample, self.record

    @property
    def record(self) -> DroppedSample:
        return self.cause, self.shard, self.key, self.detail


@dataclass(frozen=True)
class SampleFields:
    """Where a sample's labels stand in shards that others made; by default where ours have them.

    WeNet's (txt and wav): ``text: .txt``; Emilia's (json and mp3): ``lang: language``.
    """

    # the json member's key of the transcript; with a dot (.txt) the member of that ending, which
    # is the transcript, and there is no json
    text: str = "text"
    lang: str = "lang"  # the json member's key of the language
    speaker: str = "speaker"  # the json member's key of the speaker
    duration: str = "duration"  # the json member's key of the duration in seconds
    default_lang: str = ""  # language of samples that name none

    def __post_init__(self) -> None:
        names = self.text, self.lang, self.speaker, self.duration
        if not all(names) or self.text in (".", *(f".{e}" for e in EXTENSIONS)):
            raise UserError("fields: name a key of the json member, or text as an ending: .txt")
        if not is_language(self.default_lang):
            raise UserError(f"fields.default_lang: {self.default_lang[:80]!r} is no language")

    @property
    def member(self) -> str:
        """The ending of the member that has the labels."""
        return self.text[1:].lower() if self.text.startswith(".") else "json"


OWN_FIELDS = SampleFields()


class Entry(NamedTuple):
    """One row of a shard's index. Offsets and sizes in bytes, duration in seconds.

    ``json_offset`` and ``json_size`` are those of the member that has the labels.
    """

    key: str
    audio: str  # the audio member's extension
    audio_offset: int
    audio_size: int
    json_offset: int
    json_size: int
    duration: float
    chars: int
    lang: str
    fields: SampleFields = OWN_FIELDS


@dataclass(frozen=True)
class Sample:
    """One utterance of a shard; the audio is still encoded."""

    key: str
    shard: str
    audio: bytes
    extension: str
    text: str
    lang: str
    speaker: str
    duration: float
    phonemes: tuple[str, ...] | None
    alignment: dict | None
    meta: dict[str, Any]


def claimed_seconds(values: Mapping[str, Any]) -> float:
    """The duration that labels claim, 0.0 if it is none."""
    duration = values.get("duration", 0.0)
    usable = isinstance(duration, (int, float)) and 0 <= duration < MAX_SECONDS
    return float(duration) if usable and math.isfinite(duration) else 0.0


def is_unicode(text: str) -> bool:
    """False for lone surrogates, which no UTF-8 file can hold."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def parse_labels(
    data: bytes, shard: str, key: str, fields: SampleFields = OWN_FIELDS
) -> dict[str, Any]:
    """The labels of a sample's member; ``text``, ``lang`` and ``speaker`` are strings.

    Raises `BadSample`: bad_utf8, bad_json, bad_name.
    """
    try:
        content = data.decode("utf-8-sig")
        values = {"text": content.strip()} if fields.member != "json" else json.loads(content)
    except UnicodeDecodeError as error:
        raise BadSample("bad_utf8", shard, key, str(error)) from None
    except (ValueError, RecursionError) as error:
        raise BadSample("bad_json", shard, key, str(error)) from None
    if fields != OWN_FIELDS and fields.member == "json" and isinstance(values, dict):
        names = ("text", "lang", "speaker", "duration")
        found = {name: values.get(getattr(fields, name)) for name in names}
        others = {k: v for k, v in values.items() if k not in vars(fields).values()}
        values = others | {name: value for name, value in found.items() if value is not None}
    if not isinstance(values, dict) or not isinstance(values.get("text"), str):
        raise BadSample("bad_json", shard, key, f"no {fields.text!r}")
    values["lang"], values["speaker"] = (str(values.get(k) or "") for k in ("lang", "speaker"))
    values["lang"] = values["lang"] or fields.default_lang
    if not all(is_unicode(values[k]) for k in ("text", "lang", "speaker")):
        raise BadSample("bad_utf8", shard, key, "a lone surrogate")
    if not is_language(values["lang"]):
        raise BadSample("bad_name", shard, key, f"language {values['lang'][:80]!r}")
    if not is_speaker(values["speaker"]):
        raise BadSample("bad_name", shard, key, f"speaker {values['speaker'][:80]!r}")
    return values


def parse_sample(entry: Entry, shard: str, audio: bytes, data: bytes) -> Sample:
    """A sample from the bytes of its members. Raises `BadSample`."""
    values = parse_labels(data, shard, entry.key, entry.fields)
    phonemes = values.pop("phonemes", None)
    if phonemes is not None and not (
        isinstance(phonemes, list) and all(isinstance(p, str) and is_unicode(p) for p in phonemes)
    ):
        raise BadSample("bad_json", shard, entry.key, "'phonemes' is not a list of strings")
    alignment = values.pop("alignment", None)
    duration = claimed_seconds(values) or entry.duration
    values.pop("duration", None)
    return Sample(
        key=entry.key,
        shard=shard,
        audio=audio,
        extension=entry.audio,
        text=values.pop("text"),
        lang=values.pop("lang"),
        speaker=values.pop("speaker"),
        duration=duration,
        phonemes=None if phonemes is None else tuple(phonemes),
        alignment=alignment if isinstance(alignment, dict) else None,
        meta=values,
    )


def read_sample(source: str | os.PathLike | Fetch, entry: Entry, shard: str = "") -> Sample:
    """One sample by offset, from a local tar or through `Fetch`. Raises `BadSample`."""
    if callable(source):
        audio = source(entry.audio_offset, entry.audio_size)
        data = source(entry.json_offset, entry.json_size)
    else:
        shard = shard or str(source)
        with open(source, "rb") as file:
            audio = os.pread(file.fileno(), entry.audio_size, entry.audio_offset)
            data = os.pread(file.fileno(), entry.json_size, entry.json_offset)
    if len(audio) < entry.audio_size or len(data) < entry.json_size:
        raise BadSample("truncated_tar", shard, entry.key, "the tar ends before the sample does")
    return parse_sample(entry, shard, audio, data)
