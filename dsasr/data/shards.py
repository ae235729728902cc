"""Shards on disk: WebDataset tars with an index beside each and a ``dataset.json`` over all.

A sample is ``KEY.flac|wav|opus|ogg|mp3`` and ``KEY.json`` (text, lang, speaker, duration; optional
phonemes, alignment; anything else is kept as meta). ``NAME.tar`` has ``NAME.index.json``: where each
member's bytes lie, so that any sample is one read away. Members' names are keys and never paths.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import webdataset

from dsasr.errors import UserError
from dsasr.files import atomic_path, atomic_write

VERSION = 1
EXTENSIONS = ("flac", "wav", "opus", "ogg", "mp3")
DATASET = "dataset.json"
MAX_JSON = 4 << 20
MAX_AUDIO = 1 << 30


class BadSample(Exception):
    """A sample that cannot be used: ``cause`` in short snake_case, where it is, and why."""

    def __init__(self, cause: str, shard: str, key: str, detail: str = ""):
        super().__init__(f"{cause}: {key} in {shard}: {detail}")
        self.cause, self.shard, self.key, self.detail = cause, shard, key, detail

    def __reduce__(self):
        return BadSample, (self.cause, self.shard, self.key, self.detail)


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
    """One utterance as it lies in a shard; the audio is still encoded."""

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
    """A shard's index in columns: about 60 bytes a sample and its key."""

    def __init__(self, shard: str, rows: Sequence[Entry], bad: Sequence[BadSample] = ()):
        self.shard = shard
        self.bad = tuple(bad)
        self.keys = [r.key for r in rows]
        self.durations = np.array([r.duration for r in rows], np.float32)
        self.chars = np.array([r.chars for r in rows], np.int32)
        places = [(r.audio_offset, r.audio_size, r.json_offset, r.json_size) for r in rows]
        self._places = np.array(places, np.int64).reshape(len(rows), 4)
        self._langs = sorted({r.lang for r in rows})
        self._lang = np.array([self._langs.index(r.lang) for r in rows], np.int16)
        self._extensions = sorted({r.audio for r in rows})
        self._extension = np.array([self._extensions.index(r.audio) for r in rows], np.int8)

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def hours(self) -> float:
        return float(self.durations.sum(dtype=np.float64)) / 3600

    def entry(self, i: int) -> Entry:
        at = [int(v) for v in self._places[i]]
        lang, extension = self._langs[self._lang[i]], self._extensions[self._extension[i]]
        seconds, chars = float(self.durations[i]), int(self.chars[i])
        return Entry(self.keys[i], extension, *at, seconds, chars, lang)

    def __iter__(self) -> Iterator[Entry]:
        return (self.entry(i) for i in range(len(self)))

    def lang_mask(self, lang: str) -> np.ndarray:
        """[N] True where the sample is of ``lang``."""
        if lang not in self._langs:
            return np.zeros(len(self), bool)
        return self._lang == self._langs.index(lang)

    def dump(self) -> str:
        """The index file's content."""
        places = self._places.T.tolist()
        return json.dumps(
            {
                "version": VERSION,
                "keys": self.keys,
                "audio": [self._extensions[e] for e in self._extension],
                **dict(
                    zip(("audio_offset", "audio_size", "json_offset", "json_size"), places, strict=True)
                ),
                "duration": [round(float(d), 4) for d in self.durations],
                "chars": self.chars.tolist(),
                "lang": [self._langs[n] for n in self._lang],
                "bad": [[b.cause, b.key, b.detail] for b in self.bad],
            },
            ensure_ascii=False,
        )


_COLUMNS = (
    *("keys", "audio", "audio_offset", "audio_size", "json_offset", "json_size"),
    *("duration", "chars", "lang"),
)


def index_path(tar: str | os.PathLike) -> Path:
    """``NAME.index.json`` of ``NAME.tar``."""
    return Path(tar).with_suffix(".index.json")


def load_index(source: str | os.PathLike | bytes, shard: str = "") -> ShardIndex:
    """An index from its file's path or bytes. Raises ValueError if it is not a whole one."""
    if not isinstance(source, bytes):
        shard = shard or str(source).removesuffix(".index.json") + ".tar"
        source = Path(source).read_bytes()
    values = json.loads(source)
    if not isinstance(values, dict) or values.get("version") != VERSION:
        raise ValueError(f"the index of {shard} is not of version {VERSION}")
    columns = [values.get(name) for name in _COLUMNS]
    if any(not isinstance(c, list) or len(c) != len(columns[0]) for c in columns):
        raise ValueError(f"the index of {shard} is damaged")
    rows = [Entry(*row) for row in zip(*columns, strict=True)]
    bad = [BadSample(cause, shard, key, detail) for cause, key, detail in values.get("bad", [])]
    return ShardIndex(shard, rows, bad)


def members(tar: str | os.PathLike | bytes) -> Iterator[tuple[tarfile.TarInfo, bytes | None]]:
    """A tar's members in order, with the bytes of regular json files up to a limit, else None.

    Raises `EOFError` where the archive ends early, after all whole members were given.
    """
    if isinstance(tar, bytes):
        file, size = io.BytesIO(tar), len(tar)
    else:
        file, size = open(tar, "rb"), os.path.getsize(tar)  # noqa: SIM115
    with file:
        try:
            archive = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115
        except tarfile.TarError as error:
            raise EOFError(f"not a tar: {error}") from None
        while True:
            try:
                member = archive.next()
            except (tarfile.TarError, EOFError, ValueError) as error:
                raise EOFError(str(error)) from None
            if member is None:
                break
            archive.members.clear()  # tarfile keeps all headers otherwise
            if member.isreg() and member.offset_data + member.size > size:
                raise EOFError(f"{member.name[:80]} is cut off")
            data = None
            if member.isreg() and member.name.endswith(".json") and member.size <= MAX_JSON:
                here = file.tell()
                file.seek(member.offset_data)
                data = file.read(member.size)
                file.seek(here)
            yield member, data
        # A whole tar ends in a block of zeros; tarfile takes a bare end of file for one.
        if size < 512 or size % 512:
            raise EOFError("the archive's end is missing")


def build_index(tar: str | os.PathLike | bytes, shard: str = "") -> ShardIndex:
    """The index of a tar by reading its headers and json members; ``bad`` names what is wrong.

    Survives truncated tars (what is whole is indexed), missing members, links and odd names.
    """
    shard = shard or (str(tar) if not isinstance(tar, bytes) else "")
    parts: dict[str, dict[str, tuple[int, int, bytes | None]]] = {}
    bad: list[BadSample] = []
    try:
        for member, data in members(tar):
            key, _, extension = member.name.rpartition(".")
            extension = extension.lower()
            if member.isdir():
                continue
            if not member.isreg():
                bad.append(BadSample("not_a_file", shard, member.name[:200], "a link or a device"))
            elif extension in (*EXTENSIONS, "json") and key:
                if extension in parts.setdefault(key, {}):
                    bad.append(BadSample("duplicate_key", shard, key, extension))
                parts[key][extension] = (member.offset_data, member.size, data)
    except EOFError as error:
        bad.append(BadSample("truncated_tar", shard, "", str(error)))
    rows = []
    for key, held in parts.items():
        try:
            rows.append(_row(shard, key, held))
        except BadSample as error:
            bad.append(error)
    return ShardIndex(shard, rows, bad)


def _row(shard: str, key: str, held: Mapping[str, tuple[int, int, bytes | None]]) -> Entry:
    audio = [e for e in held if e != "json"]
    if "json" not in held:
        raise BadSample("missing_json", shard, key, "audio without a json member")
    if not audio:
        raise BadSample("missing_audio", shard, key, "json without an audio member")
    at, size, data = held["json"]
    if data is None:
        raise BadSample("bad_json", shard, key, f"{size} bytes of json")
    values = parse_json(data, shard, key)
    offset, length, _ = held[audio[0]]
    if length > MAX_AUDIO:
        raise BadSample("too_long", shard, key, f"{length} bytes of audio")
    text, lang = str(values["text"]), str(values.get("lang", ""))
    return Entry(key, audio[0], offset, length, at, size, _duration(values), len(text), lang)


def _duration(values: Mapping[str, Any]) -> float:
    duration = values.get("duration", 0.0)
    usable = isinstance(duration, (int, float)) and 0 <= duration < 1e7
    return float(duration) if usable else 0.0


def parse_json(data: bytes, shard: str, key: str) -> dict[str, Any]:
    """A sample's json member. Raises `BadSample`: bad_utf8, bad_json."""
    try:
        values = json.loads(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BadSample("bad_utf8", shard, key, str(error)) from None
    except (ValueError, RecursionError) as error:
        raise BadSample("bad_json", shard, key, str(error)) from None
    if not isinstance(values, dict) or not isinstance(values.get("text"), str):
        raise BadSample("bad_json", shard, key, "no 'text'")
    return values


def parse_sample(entry: Entry, shard: str, audio: bytes, data: bytes) -> Sample:
    """A sample from the bytes of its members. Raises `BadSample`."""
    values = parse_json(data, shard, entry.key)
    phonemes = values.pop("phonemes", None)
    if phonemes is not None and not (
        isinstance(phonemes, list) and all(isinstance(p, str) for p in phonemes)
    ):
        raise BadSample("bad_json", shard, entry.key, "'phonemes' is not a list of strings")
    alignment = values.pop("alignment", None)
    duration = _duration(values)
    values.pop("duration", None)
    return Sample(
        key=entry.key,
        shard=shard,
        audio=audio,
        extension=entry.audio,
        text=values.pop("text"),
        lang=str(values.pop("lang", "")),
        speaker=str(values.pop("speaker", "")),
        duration=duration,
        phonemes=None if phonemes is None else tuple(phonemes),
        alignment=alignment if isinstance(alignment, dict) else None,
        meta=values,
    )


def read_sample(
    source: str | os.PathLike | Callable[[int, int], bytes], entry: Entry, shard: str = ""
) -> Sample:
    """One sample by offset, from a local tar or through ``fetch(offset, size)``. Raises `BadSample`."""
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


@dataclass(frozen=True)
class Packed:
    """A sample to be written: ``audio`` bytes as they are, ``values`` for the json member."""

    key: str
    extension: str
    audio: bytes
    values: dict[str, Any]


def write_shard(path: str | os.PathLike, samples: Iterable[Packed]) -> ShardIndex:
    """Write ``path`` and its index, each whole or not at all; the same samples give the same bytes."""
    with atomic_path(path) as temporary:
        with open(temporary, "wb") as file:
            writer = webdataset.TarWriter(file, encoder=False, user="dsasr", group="dsasr", mtime=0)
            for sample in samples:
                if "." in sample.key.rpartition("/")[2]:
                    raise UserError(f"key '{sample.key}' has a dot: a dot ends a WebDataset key")
                data = json.dumps(sample.values, ensure_ascii=False).encode("utf-8")
                writer.write(
                    {"__key__": sample.key, sample.extension: sample.audio, "json": data}
                )
            writer.close()
        index = build_index(temporary, str(path))
    atomic_write(index_path(path), index.dump())
    return index


def shard_summary(path: Path, index: ShardIndex) -> dict[str, Any]:
    """One shard's row of dataset.json, with what is summed over shards."""
    langs: Counter[str] = Counter()
    seconds: Counter[str] = Counter()
    for entry in index:
        langs[entry.lang] += 1
        seconds[entry.lang] += entry.duration
    return {
        "name": path.name,
        "samples": len(index),
        "seconds": round(sum(seconds.values()), 3),
        "bytes": path.stat().st_size,
        "langs": {k: [langs[k], round(seconds[k], 3)] for k in sorted(langs)},
    }


def write_dataset(folder: Path, rows: Sequence[Mapping[str, Any]], speakers: int) -> dict[str, Any]:
    """``dataset.json``: the shards, counts and hours, over all and by language."""
    langs: dict[str, list[float]] = {}
    for row in rows:
        for lang, (samples, seconds) in row["langs"].items():
            held = langs.setdefault(lang, [0, 0.0])
            held[0] += samples
            held[1] += seconds
    values = {
        "version": VERSION,
        "shards": [{k: v for k, v in row.items() if k != "langs"} for row in rows],
        "samples": sum(row["samples"] for row in rows),
        "hours": round(sum(row["seconds"] for row in rows) / 3600, 4),
        "langs": {
            lang: {"samples": int(n), "hours": round(s / 3600, 4)} for lang, (n, s) in sorted(langs.items())
        },
        "speakers": speakers,
    }
    atomic_write(folder / DATASET, json.dumps(values, indent=1, ensure_ascii=False))
    return values


def read_dataset(folder: str | os.PathLike) -> dict[str, Any]:
    """``dataset.json`` of a folder. Raises `UserError`."""
    path = Path(folder) / DATASET
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values["version"] != VERSION:
            raise ValueError(f"version {values['version']}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be used ({error}): pack it with tools/make_shards.py") from None
    return values


def digest(path: str | os.PathLike) -> str:
    """sha256 of a file."""
    value = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            value.update(block)
    return value.hexdigest()
