"""Shard URLs: remote or local, brace expansion, and the shard list of a dataset."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from dsasr.utils.errors import UserError

MAX_SHARDS = 1_000_000  # of a dataset


@lru_cache(maxsize=4096)
def is_remote(url: str) -> bool:
    return bool(re.match(r"[a-z][a-z0-9+]*://", url)) and not url.startswith("file://")


def is_pipe(url: str) -> bool:
    return url.startswith("pipe:")


def shard_name(url: str) -> str:
    """The name that identifies a shard, wherever it lies: without folder, query and credentials."""
    name = url.rsplit("/", 1)[-1]
    return name.partition("?")[0] if is_remote(url) else name


def expand_braces(text: str) -> Iterator[str]:
    """``a-{000..002}-{x,y}`` → a-000-x, a-000-y, a-001-x, …; ranges keep their zero padding.

    Raises `UserError` for braces that make no list, and for more than `MAX_SHARDS` names.
    """
    count = math.prod(map(_choices, re.findall(r"\{([^{}]*)\}", text)))
    if count > MAX_SHARDS:
        raise UserError(
            f"'{text[:200]}' stands for more than {MAX_SHARDS:,} shards, the most of a dataset: "
            "check its braces"
        )
    yield from _expand(text)


def _choices(body: str) -> int:
    """How many names a pair of braces makes; 1 where `_expand` will refuse it."""
    span = re.fullmatch(r"(\d{1,18})\.\.(\d{1,18})", body)
    if span:
        return max(1, int(span[2]) - int(span[1]) + 1)
    return MAX_SHARDS + 1 if re.fullmatch(r"\d+\.\.\d+", body) else body.count(",") + 1


def _expand(text: str) -> Iterator[str]:
    match = re.search(r"\{([^{}]*)\}", text)
    if not match:
        yield text
        return
    head, body, tail = text[: match.start()], match.group(1), text[match.end() :]
    span = re.fullmatch(r"(\d+)\.\.(\d+)", body)
    if span:
        low, high = int(span[1]), int(span[2])
        if high < low:
            raise UserError(f"the range {{{body}}} in '{text}' runs backwards")
        width = len(span[1]) if span[1].startswith("0") else 0
        choices: Iterator[str] = (str(i).zfill(width) for i in range(low, high + 1))
    elif "," in body:
        choices = iter(body.split(","))
    else:
        raise UserError(f"'{{{body}}}' in '{text}' is neither a range (000..009) nor a list (a,b)")
    for choice in choices:
        yield from _expand(head + choice + tail)


@dataclass(frozen=True)
class ShardList:
    """A dataset's shards, with the counts and hours of its ``dataset.json`` if it has one."""

    shards: list[str]
    counts: np.ndarray | None = None  # samples of each
    hours: float | None = None
    langs: dict[str, float] | None = None  # hours
    sizes: np.ndarray | None = None  # bytes of its tars, or of some; 0: not known


def join_shard_lists(lists: Sequence[ShardList]) -> ShardList:
    """Several lists as one dataset. Raises `UserError` where two shards have the same name."""
    shards = [shard for part in lists for shard in part.shards]
    names = [shard_name(shard) for shard in shards]
    if len(set(shards)) < len(shards):
        raise UserError("a dataset names the same shard twice")
    if len(set(names)) < len(names) and len(lists) > 1:
        raise UserError(
            "two shards of a dataset have the same file name: make them two datasets of the mixture"
        )
    known = [part.sizes for part in lists if part.sizes is not None]
    sizes = np.concatenate(known) if len(known) == len(lists) else None
    if any(part.counts is None for part in lists):
        return ShardList(shards, sizes=sizes)
    langs: dict[str, float] = {}
    for part in lists:
        for lang, hours in (part.langs or {}).items():
            langs[lang] = langs.get(lang, 0.0) + hours
    counts = np.concatenate([part.counts for part in lists])
    return ShardList(shards, counts, sum(part.hours for part in lists), langs, sizes)
