"""A wheel, installed outside the checkout, runs the commands."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dsasr.cli.main import COMMANDS

ROOT = Path(__file__).parents[2]
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "dsasr", "ds_configs", "slurm")
# Runs commands one after the other, as a process for each would import torch anew.
PROGRAM = """
import contextlib, io, json, sys
from dsasr.cli.main import COMMANDS, main
outputs = {}
for words in [*([*name.split(), "--help"] for name in COMMANDS), *json.loads(sys.argv[1])]:
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        try:
            code = main(words)
        except SystemExit as end:
            code = end.code
    assert code == 0, words
    outputs[" ".join(words)] = text.getvalue()
print(json.dumps(outputs))
"""
TIMELINE = "timeline --recipe nim-2.3b"
PLAN = "plan cluster --recipe nim-2.3b --nodes 2"
SUBMIT = "submit train --recipe nim-2.3b --no-check --dry-run run=/shared/nim"


def pip(*arguments: str | Path, cwd: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments],
        cwd=cwd, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """A folder with nothing but the installed wheel. It is built from a copy: a build leaves files
    behind."""
    folder = tmp_path_factory.mktemp("wheel")
    source, installed = folder / "source", folder / "site"
    for name in SOURCES:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, source / name, ignore=ignored)
        else:
            source.mkdir(exist_ok=True)
            shutil.copy(ROOT / name, source)
    offline = ("--no-deps", "--no-index")
    pip("wheel", *offline, "--no-build-isolation", "--wheel-dir", folder, source, cwd=folder)
    pip("install", *offline, "--target", installed, next(folder.glob("*.whl")), cwd=folder)
    return installed


@pytest.fixture(scope="module")
def outputs(site, tiny, tmp_path_factory) -> dict[str, str]:
    """What the wheel's commands print in an empty folder, by their words."""
    check = f"train --recipe {tiny} run=run --check"
    words = [command.split() for command in (TIMELINE, PLAN, SUBMIT, check)]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(words)], capture_output=True, text=True,
        cwd=tmp_path_factory.mktemp("empty"), timeout=300,
        env={**os.environ, "PYTHONPATH": str(site), "DS_ACCELERATOR": "cpu"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def files(folder: Path) -> set[str]:
    """All but compiled files and guides."""
    paths = (p for p in folder.rglob("*") if p.is_file() and p.suffix not in (".pyc", ".md"))
    return {str(p.relative_to(folder)) for p in paths}


def test_it_has_every_file_of_the_package(site):
    expected = files(ROOT / "dsasr")
    expected |= {
        f"{name}/{file}" for name in ("ds_configs", "slurm") for file in files(ROOT / name)
    }
    assert files(site / "dsasr") == expected
    assert (site / "bin" / "dsasr").is_file()


def test_every_command_has_its_help(outputs):
    for name in COMMANDS:
        assert outputs[f"{name} --help"].startswith(f"usage: dsasr {name} ")


def test_it_plans_from_packaged_recipes(outputs):
    assert "trains   encoder" in outputs[TIMELINE] and "GPU-hours" in outputs[PLAN]


def test_it_submits_its_own_scripts(outputs, site):
    output = outputs[SUBMIT]
    assert f"CODE={site}" in output and f"{site}/dsasr/slurm/train.sbatch" in output


def test_it_checks_a_recipe(outputs, tiny):
    assert "in order" in outputs[f"train --recipe {tiny} run=run --check"]
