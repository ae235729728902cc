"""The range of a number in a recipe: an annotation of its field, checked wherever it is built.

    frames: PositiveInt = 12_000
    tokens: Annotated[int, Range(0, 1 << 20)] = 0

A dataclass calls `check` in its ``__post_init__``. Entries of lists and mappings have ranges too:
``tuple[Share, ...]``. No range holds NaN or infinity.
"""

from __future__ import annotations

import dataclasses
import functools
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from dsasr.utils.errors import UserError

LARGEST = 1e15  # of any number, far above every setting: what is larger counts as infinite


@dataclass(frozen=True)
class Range:
    """Numbers from ``low`` to ``high``; with ``above`` without ``low``, with ``below`` without
    ``high``."""

    low: float = -LARGEST
    high: float = LARGEST
    above: bool = False
    below: bool = False

    def __contains__(self, value: float) -> bool:
        if not -LARGEST <= value <= LARGEST:  # nor is NaN
            return False
        low = value > self.low if self.above else value >= self.low
        return low and (value < self.high if self.below else value <= self.high)

    def __str__(self) -> str:
        closed = not self.above and not self.below
        if closed and self.low > -LARGEST and self.high < LARGEST:
            return f"from {self.low:g} to {self.high:g}"
        words = []
        if self.low > -LARGEST:
            words.append(f"{'above' if self.above else 'at least'} {self.low:g}")
        if self.high < LARGEST:
            words.append(f"{'below' if self.below else 'at most'} {self.high:g}")
        return " and ".join(words) or "a number"


class OutOfRange(UserError):
    """A number outside its range: ``key`` of the dataclass ``owner``, and what is wrong with it."""

    def __init__(self, owner: str, key: str, reason: str):
        super().__init__(f"{owner}.{key} {reason}")
        self.key, self.reason = key, reason


NonNegativeInt = Annotated[int, Range(0)]
PositiveInt = Annotated[int, Range(1)]
NonNegativeFloat = Annotated[float, Range(0)]
PositiveFloat = Annotated[float, Range(0, above=True)]
Share = Annotated[float, Range(0, 1)]
PositiveShare = Annotated[float, Range(0, 1, above=True)]
Dropout = Annotated[float, Range(0, 1, below=True)]
Decibels = Annotated[float, Range(-200, 200)]


def check(instance: Any) -> None:
    """Raise `OutOfRange` for the first number of a dataclass that is not in its range."""
    owner = type(instance).__name__
    for name, hint in hints(type(instance)).items():
        for key, value, limits in _numbers(hint, getattr(instance, name), name):
            if value not in limits:
                if -LARGEST <= value <= LARGEST:
                    raise OutOfRange(owner, key, f"must be {limits}, not {value:g}")
                shown = value if isinstance(value, float) else "a number of that size"
                raise OutOfRange(owner, key, f"must be {limits} and finite, not {shown}")


@functools.cache
def hints(cls: type) -> dict[str, Any]:
    """The type hints of a dataclass's fields, with their ranges."""
    found = typing.get_type_hints(cls, include_extras=True)
    return {field.name: found[field.name] for field in dataclasses.fields(cls)}


def range_of(hint: Any) -> Range | None:
    """The range of an annotated number; None of other hints."""
    for extra in getattr(hint, "__metadata__", ()):
        if isinstance(extra, Range):
            return extra
    return None


def ranges_in(hint: Any) -> list[Range]:
    """The ranges of all numbers that a type hint allows, each once, in order."""
    limits = range_of(hint)
    if limits is not None:
        return [limits]
    return list(dict.fromkeys(r for inner in typing.get_args(hint) for r in ranges_in(inner)))


def _numbers(hint: Any, value: Any, key: str) -> Iterator[tuple[str, float, Range]]:
    """(key, number, its range) of each number in ``value`` that the hint gives a range."""
    limits = range_of(hint)
    if limits is not None:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            yield key, value, limits
        return
    inner = typing.get_args(hint)
    if isinstance(value, Mapping):
        of_dicts = [args for h in (hint, *inner) if len(args := typing.get_args(h)) == 2]
        for name, item in value.items():
            for args in of_dicts:
                yield from _numbers(args[1], item, f"{key}.{name}")
    elif isinstance(value, (list, tuple)):
        for kind in (hint, *inner):
            if typing.get_origin(kind) is tuple:
                kinds = typing.get_args(kind)
                kinds = kinds[:1] * len(value) if kinds[1:] == (...,) else kinds
                for number, (entry, item) in enumerate(zip(kinds, value, strict=False)):
                    yield from _numbers(entry, item, f"{key}[{number}]")
    else:
        for kind in inner:
            yield from _numbers(kind, value, key)
