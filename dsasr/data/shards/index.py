"""The index of a shard: ``NAME.index.json`` beside ``NAME.tar`` has the byte range of each member,
so that any sample can be read directly.

It also has the tar's size, so that it is not taken for another tar's, and the `SampleFields` that
its samples are read with. `dsasr.data.shards.build_index` makes it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from dsasr.data.shards.sample import EXTENSIONS, OWN_FIELDS, BadSample, Entry, SampleFields
from dsasr.data.shards.tars import MAX_LABELS
from dsasr.utils.errors import UserError
from dsasr.utils.names import is_language

VERSION = 1
MAX_AUDIO = 1 << 30  # bytes of an audio member


class ShardIndex:
    """A shard's index in columns: about 60 bytes a sample and its key.

    ``keys`` [N] list, ``durations`` [N] float32 in seconds, ``chars`` [N] int32; ``bad`` names the
    tar's unusable samples, which are not among the N; ``tar_size`` in bytes, None: not known.
    """

    def __init__(
        self,
        shard: str,
        rows: Sequence[Entry],
        bad: Sequence[BadSample] = (),
        tar_size: int | None = None,
        fields: SampleFields = OWN_FIELDS,
    ):
        names = ("key", *_COLUMNS[1:])
        columns = [[getattr(row, name) for row in rows] for name in names]
        self._fill(shard, columns, bad, tar_size, fields)

    def _fill(
        self,
        shard: str,
        columns: Sequence[list],
        bad: Sequence[BadSample],
        tar_size: int | None,
        fields: SampleFields,
    ) -> None:
        self.shard, self.bad = shard, tuple(bad)
        self.tar_size, self.fields = tar_size, fields
        self.keys, audio, *ranges, durations, chars, langs = columns
        # [N, 4]: offset and size of the audio, offset and size of the json
        self._ranges = np.array(ranges, np.int64).reshape(4, len(self.keys)).T.copy()
        self.durations = np.array(durations, np.float32)
        self.chars = np.array(chars, np.int32)
        self._langs, self._lang = _codes(langs)
        self._extensions, self._extension = _codes(audio)

    @classmethod
    def of_columns(
        cls,
        shard: str,
        columns: Sequence[list],
        bad: Sequence[BadSample] = (),
        tar_size: int | None = None,
        fields: SampleFields = OWN_FIELDS,
    ) -> ShardIndex:
        """From lists in the order of `Entry`'s fields. Raises ValueError for impossible values."""
        index = cls.__new__(cls)
        try:
            index._fill(shard, columns, bad, tar_size, fields)
            texts = (index.keys, index._langs)
            valid = (
                all(isinstance(text, str) for column in texts for text in column)
                and all(map(is_language, index._langs))
                and set(index._extensions) <= set(EXTENSIONS)
                and bool((index._ranges >= 0).all())
                and bool((index._ranges[:, 1] <= MAX_AUDIO).all())
                and bool((index._ranges[:, 3] <= MAX_LABELS).all())
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
        return Entry(self.keys[i], extension, *ranges, seconds, chars, lang, self.fields)

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
        if self.tar_size is not None:
            values["tar_size"] = self.tar_size
        if self.fields != OWN_FIELDS:
            values["fields"] = asdict(self.fields)
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
        fields = SampleFields(**values.get("fields", {}))
        size = values.get("tar_size")  # not of indexes before it was kept
        if size is not None and not (isinstance(size, int) and size >= 0):
            raise ValueError
    except (KeyError, TypeError, ValueError, AttributeError, UserError):
        raise ValueError(f"the index of {shard} is damaged") from None
    return ShardIndex.of_columns(shard, columns, bad, size, fields)
