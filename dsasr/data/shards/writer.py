"""Writes shards, their indexes and ``dataset.json``, each whole or not at all."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsasr.data.shards.build_index import build_index, local_index
from dsasr.data.shards.index import VERSION, ShardIndex, index_path
from dsasr.data.shards.sample import EXTENSIONS, SampleFields
from dsasr.utils.errors import UserError
from dsasr.utils.io import atomic_path, atomic_write

DATASET = "dataset.json"


@dataclass(frozen=True)
class PackedSample:
    """A sample to write: the bytes of its audio member, and ``values`` for its json member."""

    key: str
    extension: str
    audio: bytes
    values: dict[str, Any]


def write_tar(path: str | os.PathLike, samples: Iterable[PackedSample]) -> ShardIndex:
    """Write a WebDataset tar, whole or not at all; the same samples give the same bytes.

    Raises `UserError` for samples that no reader could use: an odd or repeated key, no text.
    """
    from webdataset import (
        TarWriter,  # imports torch, which readers of this module need not wait for
    )

    # Fixed times and users, so that the same samples give the same bytes.
    fixed = {"user": "dsasr", "group": "dsasr", "mode": 0o644, "mtime": 0}
    with atomic_path(path) as temporary:
        with (
            open(temporary, "wb") as file,
            TarWriter(file, encoder=False, format="PAX_FORMAT", **fixed) as tar,
        ):
            for sample in samples:
                if sample.key != sample_key(sample.key):
                    raise UserError(f"'{sample.key}' cannot be a key: a dot ends a WebDataset key")
                if sample.extension not in EXTENSIONS:
                    raise UserError(f"{sample.key}: '{sample.extension}' is no known audio")
                try:
                    data = json.dumps(sample.values, ensure_ascii=False).encode("utf-8")
                except UnicodeEncodeError as error:
                    raise UserError(f"{sample.key}: its text is not Unicode: {error}") from None
                tar.write({"__key__": sample.key, sample.extension: sample.audio, "json": data})
        index = build_index(temporary, str(path))
        if index.bad:
            raise UserError(f"not written: {index.bad[0]}")
    return index


def write_shard(
    path: str | os.PathLike,
    samples: Iterable[PackedSample],
    before_index: Callable[[], None] = lambda: None,
) -> ShardIndex:
    """Write ``path`` and then its index, each whole or not at all. Raises as `write_tar`.

    ``before_index`` is called between the two: the index marks the shard as finished.
    """
    index = write_tar(path, samples)
    before_index()
    atomic_write(index_path(path), index.dump())
    return index


def sample_key(name: str) -> str:
    """The WebDataset key of an utterance's id: without dots, which end keys, or leading slashes.

    Raises `UserError` for an id that cannot be a key.
    """
    key = name.replace(".", "_").lstrip("/")
    if not key or not key.isprintable():  # lone surrogates and control characters do not print
        raise UserError(f"the id {name!r} cannot be a key: use printable characters")
    return key


def index_shard(
    tar: Path, fields: SampleFields | None = None
) -> tuple[dict[str, Any], Counter[str]]:
    """Write the index of a tar that is there; its `shard_summary`, and its bad samples by cause.

    ``fields`` None: those of the index that is there, or our own. Raises `UserError`.
    """
    try:
        index = local_index(tar) if fields is None else build_index(tar, fields=fields)
        atomic_write(index_path(tar), index.dump())
    except OSError as error:
        raise UserError(f"{tar} cannot be indexed: {error.strerror or error}") from None
    return shard_summary(tar, index), Counter(bad.cause for bad in index.bad)


def shard_summary(path: Path, index: ShardIndex) -> dict[str, Any]:
    """One shard's row of dataset.json, and its (samples, seconds) by language."""
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


def write_dataset(
    folder: Path, rows: Sequence[Mapping[str, Any]], speakers: int, **counts: int
) -> dict[str, Any]:
    """Write ``dataset.json``: shards, samples and hours, total and by language, and ``counts``.

    ``rows``: the shards' `shard_summary`. Returns the values written.
    """
    langs: dict[str, list[float]] = {}
    for row in rows:
        for lang, (samples, seconds) in row["langs"].items():
            sums = langs.setdefault(lang, [0, 0.0])
            sums[0] += samples
            sums[1] += seconds
    values = {
        "version": VERSION,
        "shards": [{k: v for k, v in row.items() if k != "langs"} for row in rows],
        "samples": sum(row["samples"] for row in rows),
        "hours": round(sum(row["seconds"] for row in rows) / 3600, 4),
        "langs": {
            lang: {"samples": int(samples), "hours": round(seconds / 3600, 4)}
            for lang, (samples, seconds) in sorted(langs.items())
        },
        "speakers": speakers,
        **counts,
    }
    atomic_write(folder / DATASET, json.dumps(values, indent=1, ensure_ascii=False))
    return values


def check_file(path: Path) -> None:
    """Raise `UserError` where no file can be written, before work is spent on its content."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir() or not os.access(path.parent, os.W_OK):
            raise UserError(f"{path} cannot be written: name a file in a folder of yours")
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from None


def read_dataset(folder: str | os.PathLike) -> dict[str, Any]:
    """``dataset.json`` of a folder. Raises `UserError`."""
    path = Path(folder) / DATASET
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values["version"] != VERSION:
            raise ValueError(f"version {values['version']}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} cannot be used ({error}): pack it with `dsasr data make-shards`"
        ) from None
    return values
