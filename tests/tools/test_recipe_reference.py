"""The reference page of recipe keys is generated, and current."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[2] / "tools" / "recipe_reference.py"


def run(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(TOOL), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=TOOL.parents[1])


def test_the_page_is_current():
    done = run("--check")
    if done.returncode:
        pytest.fail(done.stderr)  # names the command that writes it


def test_a_page_is_written_and_a_stale_one_refused(tmp_path):
    page = tmp_path / "README.md"
    assert run("--page", str(page)).returncode == 0
    text = page.read_text()
    row = "| `stages.NAME.min_lr_ratio` | number | `0.0` | learning rate at the end of the decay, "
    assert row in text
    # A default of the recipe's, not of the class; a repeated section; a required key.
    assert "| `evaluation.suite.clips` | integer | `2` |" in text
    assert text.count(".min_seconds`") == 1 and "(#datadataloaderbatch)" in text
    assert "| `data.cmvn` | string | required |" in text and "| `demo` | " in text
    assert run("--page", str(page), "--check").returncode == 0
    page.write_text(text.replace("`0.0`", "`0.1`"))
    stale = run("--page", str(page), "--check")
    assert stale.returncode == 2 and "run 'python tools/recipe_reference.py'" in stale.stderr
