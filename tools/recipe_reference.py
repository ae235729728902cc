"""Write dsasr/recipes/README.md: every recipe key with its type, default and meaning.

    python tools/recipe_reference.py            # write the page
    python tools/recipe_reference.py --check    # exit code 2 if the page is not current

The meaning of a key is the comment beside its field in the source.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import types
import typing
from collections.abc import Iterator, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

from dsasr.config import to_plain
from dsasr.recipe import Recipe
from dsasr.utils import ranges
from dsasr.utils.errors import UserError, run_tool
from dsasr.utils.field_comments import field_comments
from dsasr.utils.package_data import RECIPES

PAGE = RECIPES / "README.md"
SCALARS = {str: "string", int: "integer", float: "number", bool: "true or false"}
HEAD = """# Recipes

A recipe is a YAML file with every setting of a run. `dsasr train --recipe NAME|FILE [key=value …]`
takes the name of a packaged recipe or the path of a file.

- Order of authority: the defaults below < the recipe file < `key=value` on the command line.
  Unknown keys, wrong types and numbers out of their range are errors. The run folder gets the
  resolved `recipe.yaml`; credentials in URLs are masked there.
- `base: NAME|FILE` in a recipe file starts from another recipe. It works in files only and is not
  in the tables below. Mappings merge key by key; lists and all other values are replaced.
- On the command line a key is a dotted path and the value is YAML: `model.lora='{rank: 16}'`,
  `interleave=[1,2]`, `data.augment=null`. An entry of a list is reached by its name, or by its
  position from 0: `stages.align.steps=100`, `data.train.0.weight=2`.

This page is generated from the source: `python tools/recipe_reference.py`.

## Packaged recipes

| recipe | for |
|---|---|
"""


@dataclasses.dataclass(frozen=True)
class Row:
    key: str
    kind: str
    default: str
    meaning: str


@dataclasses.dataclass
class Section:
    """The keys of one dataclass, by the dotted path at which it first stands."""

    path: str
    title: str
    rows: list[Row] = dataclasses.field(default_factory=list)


def sections(
    cls: type, instance: Any, path: str, seen: dict[type, str], title: str = ""
) -> Iterator[Section]:
    """The section of ``cls``, then those of the dataclasses in it; each class once.

    ``instance`` holds the defaults of its fields, or is None: those of the class. ``seen``: class →
    title of its section.
    """
    seen[cls] = title or path
    section, nested = Section(path, seen[cls]), []
    hints, meanings = typing.get_type_hints(cls), field_comments(cls)
    limited = ranges.hints(cls)
    for field in dataclasses.fields(cls):
        key = f"{path}.{field.name}" if path else field.name
        if not meanings[field.name]:
            raise UserError(
                f"{cls.__module__}.{cls.__name__}.{field.name} has no comment beside it"
            )
        default = getattr(instance, field.name) if instance is not None else _default(field)
        alternatives, is_list = _inner_classes(hints[field.name])
        meaning = meanings[field.name]
        for inner in alternatives:
            where = f"{key}.{_entry(inner)}" if is_list else key
            if inner in seen:
                meaning += f"; its keys are those of {_link(seen[inner])}"
            else:
                seen[inner] = where if inner is alternatives[0] else _titled(where, inner)
                known = default if isinstance(default, inner) else None
                nested.append((inner, known, where, seen[inner]))
                meaning += f"; see {_link(seen[inner])}"
        kind = type_name(hints[field.name]) + limits(limited[field.name])
        has_own_keys = dataclasses.is_dataclass(default)
        shown = "" if has_own_keys else _shown(default)
        section.rows.append(Row(key, kind, shown, meaning))
    yield section
    for inner, known, where, title in nested:
        yield from sections(inner, known, where, seen, title)


def _default(field: dataclasses.Field) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _shown(default: Any) -> str:
    if default is dataclasses.MISSING:
        return "required"
    return f"`{json.dumps(to_plain(default), ensure_ascii=False)}`"


def _inner_classes(hint: Any) -> tuple[list[type], bool]:
    """(the dataclasses in a type hint, whether the hint is a list of them)."""
    if dataclasses.is_dataclass(hint):
        return [hint], False
    classes, is_list = [], typing.get_origin(hint) is tuple
    for inner in typing.get_args(hint):
        found, nested_list = _inner_classes(inner)
        classes += found
        is_list |= bool(found) and nested_list
    return classes, is_list


def _titled(where: str, cls: type) -> str:
    """The title of an alternative's section: the key that chooses it."""
    required = next(f.name for f in dataclasses.fields(cls) if _default(f) is dataclasses.MISSING)
    return f"{where} with {required}"


def _entry(cls: type) -> str:
    named = any(field.name == "name" for field in dataclasses.fields(cls))
    return "NAME" if named else "0"


def _link(path: str) -> str:
    return f"[{path}](#{path.replace('.', '').replace(' ', '-').lower()})"


def type_name(hint: Any) -> str:
    """A type hint in the words of a recipe: "integer or null", "list of string"."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint is type(None):
        return "null"
    if dataclasses.is_dataclass(hint):
        return "section"
    if origin is typing.Literal:
        return " or ".join(f"`{value}`" for value in inner)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(type_name(kind) for kind in inner))
    if origin is tuple and inner[1:] == (...,):
        return f"list of {type_name(inner[0])}s"
    if origin is tuple:
        return f"[{', '.join(type_name(kind) for kind in inner)}]"
    if origin is dict:
        return f"mapping to {type_name(inner[1])}s"
    return SCALARS[hint]


def limits(hint: Any) -> str:
    """The ranges of the numbers in an annotated hint: ", at least 1"; empty without one."""
    # Of a list or a mapping; not of a number or null.
    many = any(typing.get_origin(kind) in (tuple, dict) for kind in (hint, *typing.get_args(hint)))
    words = " or ".join(map(str, ranges.ranges_in(hint)))
    return f", {'each ' * many}{words}" if words else ""


def purpose(path: Path) -> str:
    """The comment at the head of a recipe file, on one line."""
    lines = takewhile(lambda line: line.startswith("#"), path.read_text("utf-8").splitlines())
    text = " ".join(line.lstrip("# ") for line in lines)
    if not text:
        raise UserError(f"{path} has no comment at its head that says what it is for")
    return text


def page() -> str:
    lines = [HEAD.rstrip("\n")]
    lines += [f"| `{path.stem}` | {purpose(path)} |" for path in sorted(RECIPES.glob("*.yaml"))]
    for section in sections(Recipe, None, "", {}):
        depth = "##" if "." not in section.path else "###"
        title = section.title or "The recipe's own keys"
        lines += [
            "",
            f"{depth} {title}",
            "",
            "| key | type | default | meaning |",
            "|---|---|---|---|",
        ]
        for row in section.rows:
            cells = (f"`{row.key}`", row.kind, row.default, row.meaning)
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare, and write nothing")
    parser.add_argument(
        "--page", type=Path, default=PAGE, help="the file (dsasr/recipes/README.md)"
    )
    options = parser.parse_args(arguments)
    text = page()
    if not options.check:
        options.page.write_text(text, encoding="utf-8")
        return 0
    if not options.page.is_file() or options.page.read_text("utf-8") != text:
        raise UserError(f"{options.page} is not current: run 'python tools/recipe_reference.py'")
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(main))
