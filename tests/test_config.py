from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsasr import config
from dsasr.utils.errors import UserError


@dataclass(frozen=True)
class Inner:
    width: int = 4
    rate: float = 0.1
    kind: Literal["a", "b"] = "a"


@dataclass(frozen=True)
class Named:
    name: str
    steps: int = 1


@dataclass(frozen=True)
class Root:
    inner: Inner = field(default_factory=Inner)
    rows: tuple[Named, ...] = ()
    rates: dict[str, float] = field(default_factory=dict)
    pair: tuple[int, int] = (1, 2)
    maybe: Inner | None = None
    path: str | None = None


def test_builds_nested_values_and_converts_numbers():
    root = config.build(
        Root,
        {
            "inner": {"rate": "1e-3", "width": 8.0},
            "rows": [{"name": "x", "steps": 3}],
            "rates": {"encoder": 1},
            "pair": [3, 4],
            "maybe": {"kind": "b"},
        },
    )
    assert root.inner == Inner(8, 1e-3)
    assert root.rows == (Named("x", 3),)
    assert root.rates == {"encoder": 1.0} and isinstance(root.rates["encoder"], float)
    assert root.pair == (3, 4) and root.maybe == Inner(kind="b")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"iner": {}}, ["'iner'", "did you mean 'inner'"]),
        ({"inner": {"widht": 1}}, ["'inner.widht'", "'width'"]),
        ({"inner": {"width": "x"}}, ["inner.width", "must be a whole number"]),
        ({"inner": {"width": True}}, ["inner.width", "must be a whole number"]),
        ({"inner": {"width": 1.5}}, ["inner.width"]),
        ({"inner": {"kind": "c"}}, ["inner.kind", "a, b"]),
        ({"inner": 3}, ["inner", "mapping"]),
        ({"rows": [{"steps": 1}]}, ["rows[0].name"]),
        ({"rows": {"name": "x"}}, ["rows", "list"]),
        ({"pair": [1]}, ["pair", "2 entries"]),
    ],
)
def test_mistakes_name_the_key_and_the_fix(values, words):
    with pytest.raises(UserError) as error:
        config.build(Root, values)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_overrides_reach_lists_by_name_and_index():
    values = {"rows": [{"name": "x"}, {"name": "y"}], "inner": {"width": 1}}
    changed = config.override(
        values, ["rows.y.steps=7", "rows.0.steps=2", "inner.rate=1e-2", "pair=[5, 6]"]
    )
    root = config.build(Root, changed)
    assert [r.steps for r in root.rows] == [2, 7]
    assert root.inner.rate == 0.01 and root.pair == (5, 6)
    assert values == {"rows": [{"name": "x"}, {"name": "y"}], "inner": {"width": 1}}


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ("novalue", ["key=value"]),
        ("rows.z.steps=1", ["no entry 'z'"]),
        ("inner.width.deep=1", ["plain value"]),
        ("inner=[", ["YAML"]),
    ],
)
def test_bad_overrides_are_one_clear_line(assignment, words):
    with pytest.raises(UserError) as error:
        config.override({"rows": [{"name": "x"}], "inner": {"width": 1}}, [assignment])
    for word in words:
        assert word in str(error.value)


def test_a_time_is_no_number_to_base_60(tmp_path):
    (tmp_path / "a.yaml").write_text("time: 15:00\nhours: 24:00:00\nrate: 1.5\ncount: -3\n")
    values = config.read_recipe(str(tmp_path / "a.yaml"))
    assert values == {"time": "15:00", "hours": "24:00:00", "rate": 1.5, "count": -3}
    values = config.override({}, ["time=15:00", "ratio=1:30.5", "list=[1, 2:30]", "quoted='7'"])
    assert values == {"time": "15:00", "ratio": "1:30.5", "list": [1, "2:30"], "quoted": "7"}


def test_dump_reads_back_to_an_equal_value(tmp_path):
    root = Root(Inner(3, 0.5, "b"), (Named("x", 2),), {"e": 0.1}, (7, 8), None, "p")
    path = tmp_path / "r.yaml"
    path.write_text(config.dump(root))
    assert config.build(Root, config.read_recipe(str(path))) == root
    assert config.fingerprint(root) == config.fingerprint(config.to_plain(root))


def test_base_recipes_merge_key_by_key(tmp_path):
    (tmp_path / "a.yaml").write_text("inner: {width: 3, rate: 0.5}\npair: [3, 4]\n")
    (tmp_path / "b.yaml").write_text(f"base: {tmp_path}/a.yaml\ninner: {{width: 9}}\n")
    assert config.read_recipe(str(tmp_path / "b.yaml")) == {
        "inner": {"width": 9, "rate": 0.5},
        "pair": [3, 4],
    }


def test_a_recipe_that_is_its_own_base_is_refused(tmp_path):
    (tmp_path / "a.yaml").write_text(f"base: {tmp_path}/b.yaml\n")
    (tmp_path / "b.yaml").write_text(f"base: {tmp_path}/../{tmp_path.name}/a.yaml\n")
    (tmp_path / "c.yaml").write_text(f"base: {tmp_path}/c.yaml\n")
    for name in "abc":
        with pytest.raises(UserError, match=rf"{name}\.yaml is its own base \({name}\.yaml → "):
            config.read_recipe(str(tmp_path / f"{name}.yaml"))


LAUGHS = "a0: &a0 [x, x]\n" + "".join(
    f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}, *a{i - 1}, *a{i - 1}]\n" for i in range(1, 20)
)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: &x [*x]", "an alias contains itself"),
        ("a: &x {b: *x}", "contains itself"),
        (LAUGHS, r"more than 100,000 values \(aliases written out\)"),
        ("a: " + "[" * 5000, "not valid YAML"),
        ("a: " + "{b: " * 40 + "1" + "}" * 40, "nests deeper than 32 levels"),
        ("a: " + "[" * 2000 + "]" * 2000, "nests deeper than 32 levels"),
        ("? [1, 2]\n: 3", "not valid YAML"),
        ("a: 2026-99-99", "not valid YAML"),
        ("a: " + "9" * 5000, "not valid YAML"),
        ("a: \x1b", "not valid YAML"),
        ("- 1", "must hold a mapping"),
    ],
)
def test_a_hostile_recipe_is_one_line(tmp_path, text, says):
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=says) as error:
        config.read_recipe(str(path))
    assert "\n" not in str(error.value)
    if text.startswith("a: ") and len(text) > 1000:
        with pytest.raises(UserError, match="not valid YAML") as error:
            config.override({}, [f"a={text.removeprefix('a: ')}"])
        assert len(str(error.value)) < 400


def test_an_alias_copies_what_its_anchor_names(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("\ufeffa: &x {b: 1}\nc: *x\n", encoding="utf-8")
    assert config.read_recipe(str(path)) == {"a": {"b": 1}, "c": {"b": 1}}


def test_unknown_recipe_names_the_nearest():
    with pytest.raises(UserError, match="did you mean 'demo'"):
        config.read_recipe("dmeo")


def test_yaml_tags_run_nothing(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("a: !!python/object/apply:os.system ['echo hi']\n")
    with pytest.raises(UserError, match="not valid YAML"):
        config.read_recipe(str(path))


@given(st.dictionaries(st.sampled_from("abcd"), st.integers(), max_size=4))
def test_difference_is_empty_only_between_equals(values):
    assert config.difference(values, values) == []
    changed = {**values, "a": "other"}
    assert len(config.difference(values, changed)) == 1
