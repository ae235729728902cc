"""Reading, validation and writing of recipes: YAML ⇄ nested dataclasses, ``key=value`` overrides.

The order of authority is: dataclass defaults < recipe file < command line. Each module defines the
dataclass of its settings; this one only reads, checks and writes them. Unknown keys fail with the
nearest valid name, so a typo never trains silently with a default. ``recipes/README.md`` lists all
keys.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from dsasr.utils.errors import UserError
from dsasr.utils.masking import mask
from dsasr.utils.package_data import RECIPES
from dsasr.utils.ranges import OutOfRange

T = TypeVar("T")
MAX_DEPTH = 32  # levels of a recipe's values
MAX_VALUES = 100_000  # of a recipe
MAX_FILE = 10 << 20  # bytes of a recipe
KINDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}


def nearest(name: str, valid: Sequence[str]) -> str:
    """The end of an error message: the name of ``valid`` closest to ``name``, else all of them."""
    close = difflib.get_close_matches(str(name), list(valid), n=1, cutoff=0.5)
    if close:
        return f" (did you mean '{close[0]}'?)"
    return f" (valid: {', '.join(sorted(valid))})"


def build(cls: type[T], values: Any, path: str = "") -> T:
    """An instance of dataclass ``cls`` from plain YAML values.

    Raises `UserError` on an unknown key, a missing one, a value of the wrong type or a number out
    of its range (`dsasr.utils.ranges`), each named by its full dotted path.
    """
    if dataclasses.is_dataclass(values) and isinstance(values, cls):
        return values
    if not isinstance(values, Mapping):
        raise UserError(f"{path or 'recipe'} must be a mapping, not {_abbreviated(values)}")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
    arguments = {}
    for key, value in values.items():
        where = f"{path}.{key}" if path else str(key)
        if key not in fields:
            raise UserError(f"unknown recipe key '{where}'{nearest(key, list(fields))}")
        arguments[key] = _convert(hints[key], value, where)
    for name, field in fields.items():
        required = (
            field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        )
        if required and name not in arguments:
            where = f"{path}.{name}" if path else name
            raise UserError(f"the recipe lacks '{where}'")
    try:
        return cls(**arguments)
    except OutOfRange as error:
        where = f"{path}.{error.key}" if path else error.key
        raise UserError(f"{where} {error.reason}") from None


def _abbreviated(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return _convert_union(hint, value, where)
    if dataclasses.is_dataclass(hint):
        return build(hint, value, where)
    if hint is Any:
        return value
    if origin is typing.Literal:
        if value not in typing.get_args(hint):
            choices = ", ".join(map(str, typing.get_args(hint)))
            raise UserError(f"{where} must be one of {choices}, not {_abbreviated(value)}")
        return value
    if origin in (list, tuple):
        if not isinstance(value, (list, tuple)):
            raise UserError(f"{where} must be a list, not {_abbreviated(value)}")
        inner = typing.get_args(hint)
        kinds = [inner[0]] * len(value) if origin is list or inner[1:] == (...,) else list(inner)
        if len(kinds) != len(value):
            raise UserError(f"{where} must have {len(kinds)} entries, not {len(value)}")
        return origin(
            _convert(k, v, _entry_path(where, i, v))
            for i, (k, v) in enumerate(zip(kinds, value, strict=True))
        )
    if origin is dict:
        if not isinstance(value, Mapping):
            raise UserError(f"{where} must be a mapping, not {_abbreviated(value)}")
        kind = typing.get_args(hint)[1]
        return {str(k): _convert(kind, v, f"{where}.{k}") for k, v in value.items()}
    return _convert_scalar(hint, value, where)


def _convert_union(hint: Any, value: Any, where: str) -> Any:
    kinds = typing.get_args(hint)
    if value is None and type(None) in kinds:
        return None
    rest = [k for k in kinds if k is not type(None)]
    if isinstance(value, Mapping) and all(map(dataclasses.is_dataclass, rest)):
        # The one whose keys these are, so that an error names its keys.
        rest = [max(rest, key=lambda kind: _known_keys(kind, value))]
    error: UserError | None = None
    for kind in rest:
        try:
            return _convert(kind, value, where)
        except UserError as reason:
            error = reason
    assert error is not None
    raise error


def _known_keys(cls: type, values: Mapping) -> tuple[int, int]:
    """(keys of ``values`` that ``cls`` has, required ones among them)."""
    fields = [f for f in dataclasses.fields(cls) if f.name in values]
    required = [f for f in fields if f.default is f.default_factory is dataclasses.MISSING]
    return len(required), len(fields)


def _convert_scalar(hint: type, value: Any, where: str) -> Any:
    if hint is float and isinstance(value, str):
        # YAML 1.1 reads 1e-3 as a string; it is a number to everybody else.
        try:
            return float(value)
        except ValueError:
            raise UserError(f"{where} must be a number, not {_abbreviated(value)}") from None
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(max(-sys.maxsize, min(value, sys.maxsize)))  # a float64 has fewer numbers
    if hint is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        kind = KINDS.get(hint, hint.__name__)
        raise UserError(f"{where} must be {kind}, not {_abbreviated(value)}")
    return value


def to_plain(value: Any) -> Any:
    """Dataclasses as mappings, tuples as lists, paths as strings: values for YAML and JSON.

    Credentials in URLs are masked: these values are stored and compared.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {k: to_plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(v) for v in value]
    return mask(str(value)) if isinstance(value, (str, Path)) else value


class _Loader(yaml.SafeLoader):
    """YAML without its numbers to base 60: 15:00 is a time, not 900."""

    def resolve(self, kind: type, value: Any, implicit: Any) -> str:
        tag = super().resolve(kind, value, implicit)
        if kind is yaml.ScalarNode and ":" in value and tag.endswith((":int", ":float")):
            return self.DEFAULT_SCALAR_TAG
        return tag


def read_recipe(name_or_path: str, above: Sequence[Path] = ()) -> dict[str, Any]:
    """The plain values of a packaged recipe, or of the YAML file at a path, bases merged in.

    A recipe may name another one with ``base:``; its values then override the base's (`merge`).
    ``above``: the recipes whose base this one is. Raises `UserError` for a file that is missing,
    not YAML, or its own base.
    """
    path = Path(name_or_path)
    if path.suffix not in (".yaml", ".yml"):
        path = RECIPES / f"{name_or_path}.yaml"
    if not path.is_file():
        if path == Path(name_or_path):
            raise UserError(f"there is no recipe file {path}")
        packaged = sorted(p.stem for p in RECIPES.glob("*.yaml"))
        raise UserError(f"no recipe '{name_or_path}'{nearest(name_or_path, packaged)}")
    if path.resolve() in above:
        chain = " → ".join(p.name for p in [*above, path.resolve()])
        raise UserError(f"{path} is its own base ({chain}): remove a 'base:'")
    values = read_yaml(path) or {}
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold a mapping of recipe keys")
    base = values.pop("base", None)
    if base is None:
        return values
    return merge(read_recipe(str(base), [*above, path.resolve()]), values)


def read_yaml(path: Path) -> Any:
    """The plain values of a YAML file. Raises `UserError` where it is damaged, deep or huge."""
    try:
        if path.stat().st_size > MAX_FILE:
            raise UserError(
                f"{path} has {path.stat().st_size:,} bytes, more than a recipe can have"
            )
        return parse_yaml(path.read_text(encoding="utf-8-sig"))
    except (yaml.YAMLError, UnicodeDecodeError, OSError, ValueError) as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None


def parse_yaml(text: str) -> Any:
    """The plain values of a YAML text: mappings, lists and scalars, with text as keys.

    An alias (``*name``) copies what its anchor names. Raises `yaml.YAMLError` or ValueError for
    what is no YAML, nests deeper than `MAX_DEPTH`, has more than `MAX_VALUES` values when all
    aliases are written out, or contains itself.
    """
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):  # a loader calls itself for each level
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise ValueError(f"it nests deeper than {MAX_DEPTH} levels")
    loader = _Loader(text)
    try:
        values = loader.get_single_data()
    finally:
        loader.dispose()
    count = 0
    stack: list[tuple[Any, int]] = [(values, 0)]
    while stack:
        value, depth = stack.pop()
        count += 1
        if depth > MAX_DEPTH:
            raise ValueError("an alias contains itself, or nests too deep")
        if count > MAX_VALUES:
            raise ValueError(f"it has more than {MAX_VALUES:,} values (aliases written out)")
        if isinstance(value, dict):
            if wrong := [key for key in value if not isinstance(key, (str, int, float))]:
                raise ValueError(f"{wrong[0]!r} is no key")
            stack += [(item, depth + 1) for item in value.values()]
        elif isinstance(value, list):
            stack += [(item, depth + 1) for item in value]
    return values


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """``over`` on top of ``base``: mappings merge key by key, lists and all else are replaced."""
    merged = dict(base)
    for key, value in over.items():
        if isinstance(value, Mapping) and isinstance(merged.get(key), Mapping):
            merged[key] = merge(merged[key], value)
        else:
            merged[key] = value
    return merged


def override(values: dict[str, Any], assignments: Sequence[str]) -> dict[str, Any]:
    """``a.b=value`` assignments applied to a copy of ``values``.

    The right side is YAML: ``interleave=[1, 2]``. An entry of a list is named by its index or, if
    it has one, by its ``name``: ``stages.align.steps=100``. Raises `UserError` for a key that does
    not exist.
    """
    values = json.loads(json.dumps(values, default=str))
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not key:
            raise UserError(f"'{assignment}' is not key=value")
        try:
            value = parse_yaml(text)
        except (yaml.YAMLError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"the value of '{key}' is not valid YAML: {reason[:200]}") from None
        _assign(values, key, value)
    return values


def _assign(values: Any, key: str, value: Any) -> None:
    *parents, last = key.split(".")
    target = values
    for part in parents:
        if isinstance(target, list):
            target = target[_entry_index(target, part, key)]
        else:
            if target.get(part) is None:
                target[part] = {}
            target = target[part]
        if not isinstance(target, (dict, list)):
            raise UserError(f"'{key}' does not exist: '{part}' holds a plain value")
    if isinstance(target, list):
        target[_entry_index(target, last, key)] = value
    else:
        target[last] = value


def _entry_index(entries: list, part: str, key: str) -> int:
    if part.isdigit() and int(part) < len(entries):
        return int(part)
    names = [e.get("name", "") if isinstance(e, dict) else "" for e in entries]
    if part not in names:
        valid = [n for n in names if n] or [str(i) for i in range(len(entries))]
        raise UserError(f"'{key}' does not exist: no entry '{part}'{nearest(part, valid)}")
    return names.index(part)


def dump(value: Any) -> str:
    """A dataclass as YAML; `read_recipe` and `build` read it back to an equal one."""
    return yaml.safe_dump(to_plain(value), sort_keys=False, allow_unicode=True)


def fingerprint(value: Any) -> str:
    """16 hex digits of a SHA-256 over a dataclass or plain values, the same in every process."""
    text = json.dumps(to_plain(value), sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _entry_path(path: str, index: int, value: Any) -> str:
    """The dotted path of a list's entry: by its name, if it has one, else by its index."""
    name = value.get("name") if isinstance(value, Mapping) else None
    return f"{path}.{name}" if isinstance(name, str) and name else f"{path}[{index}]"


def difference(old: Any, new: Any, path: str = "") -> list[str]:
    """One line for each leaf that differs between two plain values: ``a.b: 1 → 2``."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        lines = []
        for key in [*old, *(k for k in new if k not in old)]:
            where = f"{path}.{key}" if path else str(key)
            lines += difference(old.get(key), new.get(key), where)
        return lines
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [
            line
            for i, (a, b) in enumerate(zip(old, new, strict=True))
            for line in difference(a, b, _entry_path(path, i, b))
        ]
    return [] if old == new else [f"{path}: {_abbreviated(old)} → {_abbreviated(new)}"]
