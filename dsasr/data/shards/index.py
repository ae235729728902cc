"""Shards on disk and their indexes: WebDataset tars, each with an index, and one ``dataset.json``.

A sample is ``KEY.flac|wav|opus|ogg|mp3`` and ``KEY.json`` (text, lang, speaker, duration; optional
phonemes, alignment; all else becomes meta). ``NAME.index.json`` beside ``NAME.tar`` has the byte
range of each member, so that any sample can be read directly. Members' names are keys, never paths
("Data is not code"). `dsasr.data.shards.pack` writes shards, `dsasr.data.shards.verify` verifies
them.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from dsasr.data.shards.tars import MAX_JSON, members
from dsasr.utils.errors import UserError
from dsasr.utils.names import is_language, is_speaker

VERSION = 1
EXTENSIONS = ("flac", "wav", "opus", "ogg", "mp3")
MAX_AUDIO = 1 << 30  # bytes of an audio member

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
class Entry:
    """One row of a shard's index. Offsets and sizes in bytes, duration in seconds."""

    key: str
    audio: str  # the audio member's extension
    audio_offset: int
    audio_size: int
    json_offset: int
    json_size: int
    duration: float
    chars: int
    lang: str


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


class ShardIndex:
    """A shard's index in columns: about 60 bytes a sample and its key.

    ``keys`` [N] list, ``durations`` [N] float32 in seconds, ``chars`` [N] int32; ``bad`` names the
    tar's unusable samples, which are not among the N.
    """

    def __init__(self, shard: str, rows: Sequence[Entry], bad: Sequence[BadSample] = ()):
        names = ("key", *_COLUMNS[1:])
        self._fill(shard, [[getattr(row, name) for row in rows] for name in names], bad)

    def _fill(self, shard: str, columns: Sequence[list], bad: Sequence[BadSample]) -> None:
        self.shard, self.bad = shard, tuple(bad)
        self.keys, audio, *ranges, durations, chars, langs = columns
        # [N, 4]: offset and size of the audio, offset and size of the json
        self._ranges = np.array(ranges, np.int64).reshape(4, len(self.keys)).T.copy()
        self.durations = np.array(durations, np.float32)
        self.chars = np.array(chars, np.int32)
        self._langs, self._lang = _codes(langs)
        self._extensions, self._extension = _codes(audio)

    @classmethod
    def of_columns(
        cls, shard: str, columns: Sequence[list], bad: Sequence[BadSample] = ()
    ) -> ShardIndex:
        """From lists in the order of `Entry`'s fields. Raises ValueError for impossible values."""
        index = cls.__new__(cls)
        try:
            index._fill(shard, columns, bad)
            texts = (index.keys, index._langs)
            valid = (
                all(isinstance(text, str) for column in texts for text in column)
                and all(map(is_language, index._langs))
                and set(index._extensions) <= set(EXTENSIONS)
                and bool((index._ranges >= 0).all())
                and bool((index._ranges[:, 1] <= MAX_AUDIO).all())
                and bool((index._ranges[:, 3] <= MAX_JSON).all())
                and bool(((index.durations >= 0) & np.isfinite(index.durations)).all())
                and bool((index.chars >= 0).all())
            )
        except (TypeError, OverflowError) as error:
            raise ValueError(f"the index of {shard} is damaged: {error}") from None
        if not valid:
            raise ValueError(f"the index of {shard} is damaged")
        return index

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def hours(self) -> float:
        return float(self.durations.sum(dtype=np.float64)) / 3600

    def entry(self, i: int) -> Entry:
        ranges = self._ranges[i].tolist()
        lang, extension = self._langs[self._lang[i]], self._extensions[self._extension[i]]
        seconds, chars = float(self.durations[i]), int(self.chars[i])
        return Entry(self.keys[i], extension, *ranges, seconds, chars, lang)

    def __iter__(self) -> Iterator[Entry]:
        return (self.entry(i) for i in range(len(self)))

    def lang_mask(self, lang: str) -> np.ndarray:
        """[N] True where the sample is of ``lang``."""
        if lang not in self._langs:
            return np.zeros(len(self), bool)
        return self._lang == self._langs.index(lang)

    def dump(self) -> str:
        """The index file's content."""
        columns = (
            self.keys,
            [self._extensions[e] for e in self._extension],
            *self._ranges.T.tolist(),
            [round(float(d), 4) for d in self.durations],
            self.chars.tolist(),
            [self._langs[n] for n in self._lang],
        )
        values = {"version": VERSION, **dict(zip(_COLUMNS, columns, strict=True))}
        values["bad"] = [[b.cause, b.key, b.detail] for b in self.bad]
        return json.dumps(values, ensure_ascii=False)


_COLUMNS = (
    *("keys", "audio", "audio_offset", "audio_size", "json_offset", "json_size"),
    *("duration", "chars", "lang"),
)


def _codes(values: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """The distinct values, sorted, and each value's index among them."""
    distinct = sorted(set(values))
    code = {value: i for i, value in enumerate(distinct)}
    return distinct, np.array([code[value] for value in values], np.int32)


def index_path(tar: str | os.PathLike) -> Path:
    """``NAME.index.json`` of ``NAME.tar``."""
    return Path(tar).with_suffix(".index.json")


def load_index(source: str | os.PathLike | bytes, shard: str = "") -> ShardIndex:
    """An index from its file's path or bytes. Raises ValueError if it is damaged."""
    if not isinstance(source, bytes):
        shard = shard or str(source).removesuffix(".index.json") + ".tar"
        source = Path(source).read_bytes()
    try:
        values = json.loads(source)
    except RecursionError:
        raise ValueError(f"the index of {shard} is damaged") from None
    if not isinstance(values, dict) or values.get("version") != VERSION:
        raise ValueError(f"the index of {shard} is not of version {VERSION}")
    columns = [values.get(name) for name in _COLUMNS]
    if any(not isinstance(c, list) or len(c) != len(columns[0]) for c in columns):
        raise ValueError(f"the index of {shard} is damaged")
    try:
        bad = [BadSample(cause, shard, key, detail) for cause, key, detail in values["bad"]]
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"the index of {shard} is damaged") from None
    return ShardIndex.of_columns(shard, columns, bad)


@dataclass
class _KeyMembers:
    """A tar's members of one key, and the metadata that their json has."""

    audio: tuple[str, int, int] | None = None  # extension, offset, size
    json: tuple[int, int] | None = None  # offset, size
    metadata: tuple[float, int, str] | BadSample | None = None  # duration, characters, language


def build_index(tar: str | os.PathLike | bytes, shard: str = "") -> ShardIndex:
    """The index of a tar, from its headers and json members; ``bad`` names its unusable samples.

    Tolerates truncated tars (whole samples are indexed), missing members, links and odd names. If
    the json has no duration, it is read from the audio's header. Members that are neither audio nor
    json are ignored.
    """
    shard = shard or (str(tar) if not isinstance(tar, bytes) else "")
    by_key: dict[str, _KeyMembers] = {}
    bad: list[BadSample] = []
    try:
        for member, data in members(tar):
            if not member.isdir():
                _note_member(shard, member, data, by_key, bad)
    except EOFError as error:
        bad.append(BadSample("truncated_tar", shard, "", str(error)))
    rows = []
    for key, key_members in by_key.items():
        try:
            rows.append(_entry(shard, key, key_members, tar))
        except BadSample as error:
            bad.append(error)
    return ShardIndex(shard, rows, bad)


def _note_member(
    shard: str,
    member: tarfile.TarInfo,
    data: bytes | None,
    by_key: dict[str, _KeyMembers],
    bad: list[BadSample],
) -> None:
    shown = member.name[:200].encode("utf-8", "backslashreplace").decode()
    if not member.isreg() or member.issparse():
        bad.append(BadSample("not_a_file", shard, shown, "a link, a device or a sparse file"))
        return
    key, _, extension = member.name.rpartition(".")
    extension = extension.lower()
    if extension not in (*EXTENSIONS, "json") or not key:
        return
    if not _is_unicode(key):
        bad.append(BadSample("bad_utf8", shard, shown, "the member's name"))
        return
    of_key = by_key.setdefault(key, _KeyMembers())
    if (of_key.json if extension == "json" else of_key.audio) is not None:
        bad.append(BadSample("duplicate_key", shard, key, f"a second {extension}"))
    elif extension != "json":
        of_key.audio = (extension, member.offset_data, member.size)
    else:
        of_key.json = (member.offset_data, member.size)
        try:
            if data is None:
                raise BadSample("bad_json", shard, key, f"{member.size} bytes of json")
            values = parse_json(data, shard, key)
            of_key.metadata = (_duration(values), len(values["text"]), values["lang"])
        except BadSample as error:
            of_key.metadata = error


def _entry(shard: str, key: str, of_key: _KeyMembers, tar: str | os.PathLike | bytes) -> Entry:
    if of_key.json is None:
        raise BadSample("missing_json", shard, key, "audio without a json member")
    if isinstance(of_key.metadata, BadSample):
        raise of_key.metadata
    if of_key.audio is None:
        raise BadSample("missing_audio", shard, key, "json without an audio member")
    extension, offset, size = of_key.audio
    if size > MAX_AUDIO:
        raise BadSample("too_long", shard, key, f"{size} bytes of audio")
    duration, chars, lang = of_key.metadata
    if not duration:
        if isinstance(tar, bytes):
            audio = tar[offset : offset + size]
        else:
            with open(tar, "rb") as file:
                audio = os.pread(file.fileno(), size, offset)
        with contextlib.suppress(soundfile.LibsndfileError):  # decoding will name the cause
            duration = header_seconds(io.BytesIO(audio))
    return Entry(key, extension, offset, size, *of_key.json, duration, chars, lang)


def header_seconds(audio: str | os.PathLike | io.BytesIO) -> float:
    """Duration by the audio's header, 0.0 if it has none. Raises `LibsndfileError`."""
    info = soundfile.info(audio if isinstance(audio, io.BytesIO) else os.fspath(audio))
    seconds = info.frames / max(info.samplerate, 1)
    return seconds if seconds < MAX_SECONDS else 0.0


MAX_SECONDS = 1e7  # the longest duration that a header or a json may claim


def _duration(values: Mapping[str, Any]) -> float:
    duration = values.get("duration", 0.0)
    usable = isinstance(duration, (int, float)) and 0 <= duration < MAX_SECONDS
    return float(duration) if usable and math.isfinite(duration) else 0.0


def _is_unicode(text: str) -> bool:
    """False for lone surrogates, which no UTF-8 file can hold."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def parse_json(data: bytes, shard: str, key: str) -> dict[str, Any]:
    """A sample's json member; ``text``, ``lang`` and ``speaker`` are strings.

    Raises `BadSample`: bad_utf8, bad_json, bad_name.
    """
    try:
        values = json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise BadSample("bad_utf8", shard, key, str(error)) from None
    except (ValueError, RecursionError) as error:
        raise BadSample("bad_json", shard, key, str(error)) from None
    if not isinstance(values, dict) or not isinstance(values.get("text"), str):
        raise BadSample("bad_json", shard, key, "no 'text'")
    values["lang"], values["speaker"] = (str(values.get(k) or "") for k in ("lang", "speaker"))
    if not all(_is_unicode(values[k]) for k in ("text", "lang", "speaker")):
        raise BadSample("bad_utf8", shard, key, "a lone surrogate")
    if not is_language(values["lang"]):
        raise BadSample("bad_name", shard, key, f"language {values['lang'][:80]!r}")
    if not is_speaker(values["speaker"]):
        raise BadSample("bad_name", shard, key, f"speaker {values['speaker'][:80]!r}")
    return values


def parse_sample(entry: Entry, shard: str, audio: bytes, data: bytes) -> Sample:
    """A sample from the bytes of its members. Raises `BadSample`."""
    values = parse_json(data, shard, entry.key)
    phonemes = values.pop("phonemes", None)
    if phonemes is not None and not (
        isinstance(phonemes, list) and all(isinstance(p, str) and _is_unicode(p) for p in phonemes)
    ):
        raise BadSample("bad_json", shard, entry.key, "'phonemes' is not a list of strings")
    alignment = values.pop("alignment", None)
    duration = _duration(values) or entry.duration
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


def read_texts(tar: str | os.PathLike) -> Iterator[Sample | BadSample]:
    """Every sample of a local tar without reading its audio, or why it is bad."""
    index = build_index(tar)
    yield from index.bad
    with open(tar, "rb") as file:
        for entry in index:
            data = os.pread(file.fileno(), entry.json_size, entry.json_offset)
            try:
                yield parse_sample(entry, index.shard, b"", data)
            except BadSample as error:
                yield error


def find_tars(paths: Iterable[str | os.PathLike]) -> list[Path]:
    """Local tars of files and folders, sorted. Raises `UserError` if there is none."""
    tars: list[Path] = []
    for path in map(Path, paths):
        if not path.exists():
            raise UserError(f"there is no {path}")
        tars += sorted(path.glob("*.tar")) if path.is_dir() else [path]
    if not tars:
        raise UserError(f"no .tar in {', '.join(map(str, paths))}")
    return tars
