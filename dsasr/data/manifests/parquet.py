"""Parquet files of Hugging Face data sets, whose audio column holds encoded audio."""

from __future__ import annotations

import glob
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from dsasr.data.manifests.entry import Corpus, Form, ManifestEntry
from dsasr.data.manifests.rows import LANG_NAMES, SPEAKER_NAMES, TEXT_NAMES, audio_of, first_of
from dsasr.data.manifests.trees import one_split, split_of
from dsasr.utils.errors import UserError, message_of

_ID_NAMES = ("id", "key", "segment_id", "utterance_id")
_MAGIC = {b"RIFF": "wav", b"fLaC": "flac", b"OggS": "ogg", b"ID3": "mp3", b"FORM": "aiff"}
_ROWS = 64  # in memory at once


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        return sorted(p for p in path.rglob("*.parquet") if not p.name.startswith("._"))
    if path.suffix != ".parquet":
        return []
    return [path] if path.is_file() else sorted(map(Path, glob.glob(str(path))))


def _read(corpus: Corpus) -> Iterator[ManifestEntry]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(
            f'{corpus.path} is Parquet: pip install "dsasr[parquet]" (or pyarrow) to read it'
        ) from None
    files = _files(corpus.path)
    root = corpus.path if corpus.path.is_dir() else corpus.path.parent
    named = one_split(corpus, [(PurePosixPath(f.relative_to(root)), f) for f in files])
    number = 0
    for name, path in named:
        try:
            table = pyarrow.parquet.ParquetFile(path)
            column = _audio_column(path, table.schema_arrow)
            columns = [f.name for f in table.schema_arrow if _is_plain(f.type)]
            for batch in table.iter_batches(_ROWS, columns=[column, *columns]):
                for row in batch.to_pylist():
                    number += 1
                    if entry := _entry(corpus, row, row.get(column) or {}, number):
                        yield replace(entry, split=split_of(name))
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"{path} cannot be read: {message_of(error)}") from None


def _is_plain(kind: Any) -> bool:
    import pyarrow.types as types

    return types.is_string(kind) or types.is_large_string(kind) or types.is_integer(kind)


def _audio_column(path: Path, schema: Any) -> str:
    """The column of structures with bytes and a path."""
    for field in schema:
        inner = field.type
        if {"bytes", "path"} <= {inner.field(i).name for i in range(inner.num_fields)}:
            return field.name
    raise UserError(f"{path} has no column of audio (bytes and path)")


def _entry(corpus: Corpus, row: dict, audio: dict, number: int) -> ManifestEntry | None:
    name = first_of(row, _ID_NAMES) or PurePosixPath(audio.get("path") or f"row-{number:08d}").stem
    text = first_of(row, TEXT_NAMES)
    if not text.strip():
        detail = f"none of the columns {', '.join(TEXT_NAMES)} has a text"
        corpus.leave_out("missing_text", name, detail)
        return None
    data, path = audio.get("bytes"), audio.get("path") or ""
    if data:
        suffix = next((e for magic, e in _MAGIC.items() if data.startswith(magic)), "")
        suffix = suffix or PurePosixPath(path).suffix.lstrip(".").lower() or "mp3"
        file = corpus.folder_for_audio() / f"{number:08d}.{suffix}"
        file.write_bytes(data)
    else:
        try:
            file = audio_of(path, corpus.path if corpus.path.is_dir() else corpus.path.parent)
        except ValueError:
            corpus.leave_out("missing_audio", name, "neither bytes nor a path")
            return None
    lang = first_of(row, LANG_NAMES) or corpus.lang
    return ManifestEntry(name, file, text, first_of(row, SPEAKER_NAMES), lang)


def _is_parquet(path: Path) -> bool:
    return bool(_files(path))


PARQUET = Form("parquet", "Parquet files of Hugging Face", _is_parquet, _read, True)
