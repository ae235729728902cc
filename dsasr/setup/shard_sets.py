"""Shards that are there already, of this project's or of another's making: used where they lie."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from dsasr.data.manifests.entry import Corpus, Form, ManifestEntry
from dsasr.data.manifests.rows import LANG_NAMES, SPEAKER_NAMES, TEXT_NAMES, lines
from dsasr.data.shards.build_index import find_tars
from dsasr.data.shards.index import index_path, load_index
from dsasr.data.shards.sample import EXTENSIONS, OWN_FIELDS, SampleFields
from dsasr.data.shards.tars import members
from dsasr.utils.errors import UserError

_PEEK = 40  # members of a tar by which its samples are recognized
_DURATION_NAMES = ("duration", "dur", "seconds")


def is_shards(path: Path) -> bool:
    """Whether ``path`` is a tar of samples (KEY.wav with KEY.json or KEY.txt), or has such tars."""
    if path.is_dir():
        first = next(iter(sorted(p for p in path.glob("*.tar") if p.name[0] != ".")), None)
        return first is not None and fields_of(first) is not None
    return path.suffix == ".tar" and fields_of(path) is not None


def tars_of(path: Path) -> list[Path]:
    """The tars of a folder, of a list of shards, or a tar itself. Raises `UserError`."""
    if path.is_dir() or path.suffix == ".tar":
        return find_tars([path])
    named = [Path(line.strip()) for _, line in lines(path)]
    return find_tars([tar if tar.exists() else path.parent / tar for tar in named])


def fields_of(tar: Path) -> SampleFields | None:
    """Where the labels of the tar's samples stand, by its index or its first members; None: it has
    no samples."""
    if index_path(tar).is_file():
        try:
            return load_index(index_path(tar)).fields
        except (OSError, ValueError):
            pass
    endings: dict[str, set[str]] = {}
    labels: dict = {}
    try:
        for (member, data), _ in zip(members(tar), range(_PEEK), strict=False):
            key, _, ending = member.name.rpartition(".")
            endings.setdefault(key, set()).add(ending.lower())
            if data is not None and not labels:
                labels = _object(data)
    except (EOFError, OSError):
        pass  # a tar that is cut off has whole members before
    with_audio = [found for found in endings.values() if found & set(EXTENSIONS)]
    text = next((name for name in TEXT_NAMES if isinstance(labels.get(name), str)), "")
    if any("json" in found for found in with_audio) and text:
        own = {"lang": LANG_NAMES, "speaker": SPEAKER_NAMES, "duration": _DURATION_NAMES}
        found = {
            field: next((name for name in names if name in labels), getattr(OWN_FIELDS, field))
            for field, names in own.items()
        }
        return SampleFields(text=text, **found)
    if any("txt" in found for found in with_audio):
        return SampleFields(text=".txt")
    return None


def _object(data: bytes) -> dict:
    try:
        values = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def _refuse(corpus: Corpus) -> Iterator[ManifestEntry]:
    raise UserError(f"{corpus.path} holds shards, which need no packing")
    yield


SHARDS = Form(
    "shards", "shards of WebDataset (this project's, WeNet's, Emilia's)", is_shards, _refuse
)
