"""The recipe in a run folder, and where its relative paths lead.

recipe.yaml begins with a comment that says in which folder the run was started. Relative paths mean
files below that, from wherever the run is evaluated or exported.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dsasr import config
from dsasr.utils.io import atomic_write

RECIPE = "recipe.yaml"
_STARTED_IN = "# relative paths are from "
# Keys that hold paths, or lists of them; *: all entries of a list.
_PATHS = (
    "data.train.*.shards", "data.valid.*.shards", "data.cmvn", "data.phonemes",
    "data.phonemizer.lexicons", "data.text_only.path", "data.text_only.confusions",
    "data.dataloader.noise", "model.llm.path", "model.tokenizer", "model.encoder.path",
    "model.encoder_from", "model.init_from", "store.path",
)  # fmt: skip
_PATTERN = re.compile(r"[*?\[{]")  # where a glob or a brace pattern begins


def write(folder: Path, recipe: Any) -> None:
    """Write ``recipe`` (a dataclass) as the recipe of the run in ``folder``, started here."""
    atomic_write(folder / RECIPE, f"{_STARTED_IN}{Path.cwd()}\n{config.dump(recipe)}")


def read(folder: Path) -> dict[str, Any]:
    """The plain values of the recipe in ``folder``, with relative paths that lead to something
    below the folder that the run was started in made absolute. Raises `UserError`."""
    values = config.read_recipe(str(folder / RECIPE))
    start = _started_in(folder / RECIPE)
    if start is None or start == Path.cwd():
        return values
    for key in _PATHS:
        _change(values, key.split("."), lambda path: _below(start, path))
    return values


def _started_in(path: Path) -> Path | None:
    with open(path, encoding="utf-8") as file:
        first = file.readline()
    if not first.startswith(_STARTED_IN):
        return None  # an older release's, or one that was written by hand
    return Path(first.removeprefix(_STARTED_IN).rstrip("\n"))


def _below(start: Path, path: str) -> str:
    if not path or "://" in path or Path(path).is_absolute():
        return path
    fixed = _PATTERN.split(path, maxsplit=1)[0]
    if fixed != path:  # a pattern: the folder before it must be there
        fixed = fixed.rpartition("/")[0]
    return str(start / path) if (start / fixed).exists() else path


def _change(values: Any, keys: list[str], change: Callable[[str], str]) -> None:
    """Apply ``change`` to the strings at ``keys``, where there are any; in place."""
    first, *rest = keys
    if first == "*":
        for entry in values if isinstance(values, list) else ():
            _change(entry, rest, change)
        return
    if not isinstance(values, dict) or first not in values:
        return
    if rest:
        return _change(values[first], rest, change)
    found = values[first]
    if isinstance(found, str):
        values[first] = change(found)
    elif isinstance(found, list):
        values[first] = [change(x) if isinstance(x, str) else x for x in found]
    elif isinstance(found, dict):  # set of shards → weight
        values[first] = {change(key): weight for key, weight in found.items()}
