"""A trained run, for the commands that read one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def training(tiny, tmp_path_factory) -> tuple[Path, str]:
    """The run folder of the tiny recipe and what ``dsasr train`` printed about it."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    command = [sys.executable, "-m", "dsasr.cli", "train", "--ranks", "1"]
    done = subprocess.run(
        [*command, "--recipe", str(tiny), f"run={folder}"], cwd=ROOT, text=True, timeout=300,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    return folder, done.stdout


@pytest.fixture(scope="session")
def trained(training) -> Path:
    """The folder of a trained run."""
    return training[0]
