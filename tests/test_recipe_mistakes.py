"""Mistakes over all keys of a recipe: one line that names the key, before anything is trained."""

from __future__ import annotations

import copy
import dataclasses
import math
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dsasr import config, recipe
from dsasr.utils import ranges
from dsasr.utils.errors import UserError
from dsasr.utils.ranges import Range

Keys = tuple[str | int, ...]  # of nested mappings and lists


def leaves(hint: Any, keys: Keys = ()) -> Iterator[tuple[Keys, Any]]:
    """(keys, annotated hint) of every value of a recipe that is no section; a list of sections has
    one entry, a mapping the key x."""
    if dataclasses.is_dataclass(hint):
        for name, inner in ranges.hints(hint).items():
            yield from leaves(inner, (*keys, name))
        return
    sections = [kind for kind in typing.get_args(hint) if dataclasses.is_dataclass(kind)]
    if typing.get_origin(hint) is tuple and sections:
        yield from leaves(sections[0], (*keys, 0))
    elif sections and typing.get_origin(hint) in (typing.Union, types.UnionType):
        for kind in sections:
            yield from leaves(kind, keys)
    else:
        yield keys, hint


LEAVES = list(leaves(recipe.Recipe))
# A section that the demo leaves out, or has in another kind → values with which it is whole.
WHOLE = {
    ("data", "text_only"): {"path": "x"},
    ("drift", "swaps", 0): {"pretrain": 5},
    ("model", "encoder"): {"path": "x"},
}


def numbers(hint: Any) -> Iterator[tuple[Any, Range]]:
    """(a value in which 'BAD' stands for a number, that number's range)."""
    limits = ranges.range_of(hint)
    if limits is not None:
        yield "BAD", limits
        return
    inner = typing.get_args(hint)
    if typing.get_origin(hint) is dict:
        yield from (({"x": value}, r) for value, r in numbers(inner[1]))
    elif typing.get_origin(hint) is tuple:
        for value, limits in numbers(inner[0]):
            yield [value] * (1 if inner[1:] == (...,) else len(inner)), limits
    else:
        for kind in inner:
            yield from numbers(kind)


NUMBERS = [(keys, value, r) for keys, hint in LEAVES for value, r in numbers(hint)]


def plain_numbers(hint: Any) -> bool:
    """Whether a hint has a number without a range."""
    if ranges.range_of(hint) is not None:
        return False
    return hint in (int, float) or any(map(plain_numbers, typing.get_args(hint)))


def test_every_number_of_a_recipe_has_a_range():
    assert [".".join(map(str, keys)) for keys, hint in LEAVES if plain_numbers(hint)] == []
    assert len(NUMBERS) > 100


def outside(limits: Range) -> list[float]:
    values = [math.nan, math.inf, -math.inf, 1e16, -1e16, 10**400]
    if limits.low > -ranges.LARGEST:
        values += [limits.low - 1, *([limits.low] if limits.above else [])]
    if limits.high < ranges.LARGEST:
        values += [limits.high + 1, *([limits.high] if limits.below else [])]
    return values


def filled(template: Any, value: Any) -> Any:
    if isinstance(template, list):
        return [filled(item, value) for item in template]
    if isinstance(template, dict):
        return {key: filled(item, value) for key, item in template.items()}
    return value


def changed(values: dict, keys: Keys, value: Any) -> dict:
    """A copy of a recipe's plain values with another value at ``keys``."""
    values = copy.deepcopy(values)
    target: Any = values
    for number, key in enumerate(keys[:-1]):
        inner = target[key] if isinstance(key, int) and len(target) > key else None
        inner = target.get(key) if isinstance(key, str) else inner
        place = keys[: number + 1]
        lacks = not isinstance(inner, (dict, list)) or (place in WHOLE and keys[-1] not in inner)
        if lacks or inner == []:
            inner = [] if isinstance(keys[number + 1], int) else dict(WHOLE.get(place, {}))
            if isinstance(key, int):
                target.append(inner)
            else:
                target[key] = inner
        target = inner
    if isinstance(target, list):
        target[:] = [value]
    else:
        target[keys[-1]] = value
    return values


def shown(keys: Keys) -> str:
    return ".".join(str(key) for key in keys if isinstance(key, str))


@pytest.fixture(scope="module")
def demo() -> dict:
    return config.to_plain(recipe.load("demo"))


@pytest.mark.parametrize(
    ("keys", "template", "limits"), NUMBERS, ids=[shown(keys) for keys, *_ in NUMBERS]
)
def test_a_number_outside_its_range_is_named(demo, keys, template, limits):
    for value in outside(limits):
        with pytest.raises(UserError) as error:
            config.build(recipe.Recipe, changed(demo, keys, filled(template, value)))
        message = str(error.value)
        assert keys[-1] in message and message.startswith(str(keys[0])), message
        assert "must be" in message and "\n" not in message and len(message) < 300


# Values that no key, or hardly any, takes.
MISTAKES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.sampled_from([-1, 10**30, 1e308, -0.5, math.nan, math.inf, -math.inf]),
    st.sampled_from(["", " ", "x", "auto", "../..", "/dev/null", "☃", "\x1b[2J", "a\nb", "${NONE}",
                     "http://me:S3CRET@127.0.0.1:9/x.tar", "pipe:true", "{0..99999999}.tar"]),
    st.lists(st.integers(-1, 2), max_size=3),
    st.dictionaries(st.sampled_from(["path", "name", "x"]), st.integers(-1, 2), max_size=2),
)  # fmt: skip


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(place=st.sampled_from(LEAVES), value=MISTAKES)
def test_any_mistake_is_one_line_and_nothing_is_written(
    tiny, command, offline, tmp_path, place, value
):
    keys, _ = place
    if keys[-1] in ("run", "kernels"):  # a global setting; a folder of the working directory
        return
    base = config.read_recipe(str(tiny))
    base |= {"run": str(tmp_path / "run")}
    base["data"]["dataloader"]["source"] = {"attempts": 1, "cache": str(tmp_path / "cache")}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(changed(base, keys, value)))
    before = sorted(p for p in Path(tmp_path).rglob("*") if "cache" not in p.parts)
    done = command("train", "--recipe", path, "--check")
    assert done.returncode in (0, 2), (keys, value, done.stderr)
    lines = done.stderr.splitlines()
    if done.returncode == 2:
        assert len(lines) == 1 and lines[0].startswith("error: "), (keys, value, lines)
    assert "S3CRET" not in done.stdout + done.stderr and "\x1b" not in done.stdout + done.stderr
    assert sorted(p for p in Path(tmp_path).rglob("*") if "cache" not in p.parts) == before
