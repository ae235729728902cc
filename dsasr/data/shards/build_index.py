"""Builds a shard's index from its tar, and reads its transcripts."""

from __future__ import annotations

import contextlib
import os
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from dsasr.data.audio.files import ERRORS, AudioError, audio_seconds
from dsasr.data.shards.index import MAX_AUDIO, ShardIndex, index_path, load_index
from dsasr.data.shards.sample import (
    EXTENSIONS,
    OWN_FIELDS,
    BadSample,
    Entry,
    Sample,
    SampleFields,
    claimed_seconds,
    is_unicode,
    parse_labels,
    parse_sample,
)
from dsasr.data.shards.tars import is_macos_extra, members
from dsasr.utils.errors import UserError


@dataclass
class _KeyMembers:
    """A tar's members of one key, and the metadata that their labels have."""

    audio: tuple[str, int, int] | None = None  # extension, offset, size
    labels: tuple[int, int] | None = None  # offset, size
    metadata: tuple[float, int, str] | BadSample | None = None  # duration, characters, language


def build_index(
    tar: str | os.PathLike | bytes, shard: str = "", fields: SampleFields = OWN_FIELDS
) -> ShardIndex:
    """The index of a tar, from its headers and labels; ``bad`` names its unusable samples.

    Tolerates truncated tars (whole samples are indexed), missing members, links and odd names. If
    the labels have no duration, it is read from the audio's header. Members that are neither audio
    nor labels are ignored, and so are those that macOS adds (``._KEY.wav``).
    """
    shard = shard or (str(tar) if not isinstance(tar, bytes) else "")
    by_key: dict[str, _KeyMembers] = {}
    bad: list[BadSample] = []
    try:
        for member, data in members(tar, fields.member):
            if not member.isdir() and not is_macos_extra(member.name):
                _note_member(shard, member, data, by_key, bad, fields)
    except EOFError as error:
        bad.append(BadSample("truncated_tar", shard, "", str(error)))
    rows = []
    for key, key_members in by_key.items():
        try:
            rows.append(_entry(shard, key, key_members, tar, fields))
        except BadSample as error:
            bad.append(error)
    size = len(tar) if isinstance(tar, bytes) else os.path.getsize(tar)
    return ShardIndex(shard, rows, bad, size, fields)


def _note_member(
    shard: str,
    member: tarfile.TarInfo,
    data: bytes | None,
    by_key: dict[str, _KeyMembers],
    bad: list[BadSample],
    fields: SampleFields,
) -> None:
    shown = member.name[:200].encode("utf-8", "backslashreplace").decode()
    if not member.isreg() or member.issparse():
        bad.append(BadSample("not_a_file", shard, shown, "a link, a device or a sparse file"))
        return
    key, _, extension = member.name.rpartition(".")
    extension = extension.lower()
    if extension not in (*EXTENSIONS, fields.member) or not key:
        return
    if not is_unicode(key):
        bad.append(BadSample("bad_utf8", shard, shown, "the member's name"))
        return
    of_key = by_key.setdefault(key, _KeyMembers())
    if (of_key.labels if extension == fields.member else of_key.audio) is not None:
        bad.append(BadSample("duplicate_key", shard, key, f"a second {extension}"))
    elif extension != fields.member:
        of_key.audio = (extension, member.offset_data, member.size)
    else:
        of_key.labels = (member.offset_data, member.size)
        try:
            if data is None:
                raise BadSample("bad_json", shard, key, f"{member.size} bytes of labels")
            values = parse_labels(data, shard, key, fields)
            of_key.metadata = (claimed_seconds(values), len(values["text"]), values["lang"])
        except BadSample as error:
            of_key.metadata = error


def _entry(
    shard: str,
    key: str,
    of_key: _KeyMembers,
    tar: str | os.PathLike | bytes,
    fields: SampleFields,
) -> Entry:
    if of_key.labels is None:
        raise BadSample("missing_json", shard, key, f"audio without a {fields.member} member")
    if isinstance(of_key.metadata, BadSample):
        raise of_key.metadata
    if of_key.audio is None:
        raise BadSample("missing_audio", shard, key, f"{fields.member} without an audio member")
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
        with contextlib.suppress(AudioError, *ERRORS):  # decoding will name the cause
            duration = audio_seconds(audio)
    return Entry(key, extension, offset, size, *of_key.labels, duration, chars, lang, fields)


def readable_index(tar: str | os.PathLike, fields: SampleFields | None = None) -> ShardIndex:
    """`local_index`. Raises `UserError` where the tar cannot be read."""
    try:
        return local_index(tar, fields)
    except OSError as error:
        raise UserError(f"{tar} cannot be read: {error.strerror or error}") from None


def local_index(tar: str | os.PathLike, fields: SampleFields | None = None) -> ShardIndex:
    """The index of a local tar, built anew; with ``fields``, or None: those of its index file, if
    it has one."""
    if fields is not None:
        return build_index(tar, fields=fields)
    with contextlib.suppress(OSError, ValueError):
        return build_index(tar, fields=load_index(index_path(tar)).fields)
    return build_index(tar)


def read_texts(
    tar: str | os.PathLike, fields: SampleFields | None = None
) -> Iterator[Sample | BadSample]:
    """Every sample of a local tar without reading its audio, or why it is bad; ``fields`` as for
    `local_index`.

    Raises `UserError` where the tar cannot be read.
    """
    index = readable_index(tar, fields)
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
        found = sorted(path.glob("*.tar")) if path.is_dir() else [path]
        tars += [tar for tar in found if not is_macos_extra(tar.name)]
    if not tars:
        raise UserError(f"no .tar in {', '.join(map(str, paths))}")
    return tars
