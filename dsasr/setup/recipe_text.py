"""A recipe as a text: what differs from its base, with the reason beside each line."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from dsasr import config

WIDTH = 100


@dataclass(frozen=True)
class Setting:
    """``key``: dotted, as on the command line; ``why``: a comment; ``whys``: of its entries."""

    key: str
    value: Any
    why: str
    whys: tuple[str, ...] = field(default=())


def values_of(settings: Sequence[Setting]) -> dict[str, Any]:
    """The settings as nested plain values."""
    values: dict[str, Any] = {}
    for setting in settings:
        *parents, last = setting.key.split(".")
        place = values
        for part in parents:
            place = place.setdefault(part, {})
        place[last] = setting.value
    return values


def differing(bases: Sequence[Mapping[str, Any]], settings: Sequence[Setting]) -> list[Setting]:
    """The settings whose value none of ``bases`` has already: a base as it is written, and with
    all defaults."""
    return [s for s in settings if all(_value_at(base, s.key) != (True, s.value) for base in bases)]


def _value_at(values: Any, key: str) -> tuple[bool, Any]:
    """(whether a dotted key is given, its value)."""
    for part in key.split("."):
        if not isinstance(values, Mapping) or part not in values:
            return False, None
        values = values[part]
    return True, values


def write(header: Sequence[str], base: str, settings: Sequence[Setting]) -> str:
    """The YAML text; it reads back as `values_of` on top of the base."""
    lines = [line for text in header for line in _comment(text, "")]
    lines.append(f"base: {_flow(base)}")
    ordered = _grouped(settings)
    open_keys: list[str] = []
    for setting in ordered:
        *parents, last = setting.key.split(".")
        common = 0
        while common < len(parents) and open_keys[: common + 1] == parents[: common + 1]:
            common += 1
        if not common:
            lines.append("")
        for depth in range(common, len(parents)):
            lines.append(f"{'  ' * depth}{parents[depth]}:")
        open_keys = parents
        lines += _lines(setting, last, "  " * len(parents))
    text = "\n".join(lines) + "\n"
    values = config.parse_yaml(text)
    assert {k: v for k, v in values.items() if k != "base"} == config.to_plain(values_of(settings))
    return text


def _grouped(settings: Sequence[Setting]) -> list[Setting]:
    """Settings of one section together, all in the order of their first appearance."""
    order: dict[tuple[str, ...], int] = {}
    for setting in settings:
        for prefix in _prefixes(setting.key):
            order.setdefault(prefix, len(order))
    return sorted(settings, key=lambda setting: [order[p] for p in _prefixes(setting.key)])


def _prefixes(key: str) -> list[tuple[str, ...]]:
    parts = tuple(key.split("."))
    return [parts[:depth] for depth in range(1, len(parts) + 1)]


def _lines(setting: Setting, name: str, indent: str) -> list[str]:
    if setting.whys:
        lines = [*_comment(setting.why, indent), f"{indent}{name}:"]
        for entry, why in zip(setting.value, setting.whys, strict=True):
            lines += [*_comment(why, f"{indent}  "), f"{indent}  - {_flow(entry)}"]
        return lines
    line = f"{indent}{name}: {_flow(setting.value)}"
    beside = f"{line}  # {setting.why}"
    if len(beside) <= WIDTH:
        return [beside]
    return [*_comment(setting.why, indent), line]


def _comment(text: str, indent: str) -> list[str]:
    if not text:
        return []
    width = WIDTH - len(indent) - 2
    return [f"{indent}# {line}" for line in textwrap.wrap(text, width, break_on_hyphens=False)]


def _flow(value: Any) -> str:
    """A value on one line of YAML, whatever is in it."""
    options = {"default_flow_style": True, "sort_keys": False, "allow_unicode": True}
    text = yaml.safe_dump(value, width=10**9, **options).removesuffix("\n").removesuffix("\n...")
    return text if "\n" not in text else json.dumps(value)  # of a name with a line break
