"""The table of commands and how one is found."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from dsasr.cli import main

FOLDER = Path(main.__file__).parent


def test_every_module_is_in_the_table_and_has_an_example():
    others = {"__init__", "__main__", "main", "arguments"}
    paths = [path for path in FOLDER.rglob("*.py") if path.stem not in others]
    modules = {".".join(path.relative_to(FOLDER).with_suffix("").parts): path for path in paths}
    names = {name.replace(" ", ".").replace("-", "_"): name for name in main.COMMANDS}
    assert modules.keys() == names.keys()
    for module, path in modules.items():
        doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
        head, *rest = doc.split("\n\n")
        assert head.endswith(".") and "\n" not in head, path
        assert rest[-1].startswith("example") and f"dsasr {names[module]}" in rest[-1], path


def test_help_lists_commands_and_groups(command):
    for words in ([], ["--help"]):
        done = command(*words)
        assert done.returncode == 0 and all(name in done.stdout for name in main.COMMANDS)
    done = command("data")
    assert "data verify" in done.stdout and "transcribe" not in done.stdout
    assert command("--version").stdout.startswith("dsasr ")


@pytest.mark.parametrize(
    ("words", "nearest"),
    [("evalute", "evaluate"), ("data make_shards", "data make-shards"), ("qqq", "valid: ")],
)
def test_an_unknown_command_is_refused_with_the_nearest(command, words, nearest):
    done = command(*words.split())
    assert done.returncode == 2 and nearest in done.stderr and done.stderr.count("\n") == 1


def test_help_of_a_command_ends_with_its_example(command):
    done = command("data", "make-shards", "--help")
    assert done.returncode == 0 and done.stdout.startswith("usage: dsasr data make-shards ")
    assert done.stdout.rstrip().endswith("--out shards/train --lang en")
