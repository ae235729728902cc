"""`dsasr doctor`: one rank in this process, two under the launcher."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from dsasr.doctor import rank
from dsasr.utils.errors import Failure

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def no_other_ranks(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "SLURM_JOB_ID"):
        monkeypatch.delenv(name, raising=False)


def test_one_rank_with_a_recipe(command, tiny, tmp_path):
    run = tmp_path / "run"
    done = command("doctor", "--recipe", tiny, f"run={run}", "--ranks", 1)
    rows = {line.split("  ")[0]: line for line in done.stdout.splitlines()}
    assert done.returncode == 0, done.stdout + done.stderr
    assert list(rows)[1:] == ["ranks", "versions", "GPUs", "products", "run folder", "reading",
                              "writing", "free space"]  # fmt: skip
    assert rows["free space"].endswith("ok") and "a checkpoint" in rows["writing"]
    assert list(tmp_path.iterdir()) == []


def test_what_falls_short_is_exit_code_1(command, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("dsasr.doctor.measure.free_bytes", lambda _: 1000.0)
    done = command("doctor", "--recipe", tiny, f"run={tmp_path / 'run'}", "--ranks", 1)
    assert done.returncode == 1
    assert "short: free space: 0.001 MB are free" in done.stdout.splitlines()[-1]


def test_mistakes_are_one_line(command, tiny):
    for words in (["seed=2"], ["--recipe", "none"], ["--recipe", tiny, "sed=1"]):
        done = command("doctor", *words, "--ranks", 1)
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr


def test_a_plan_that_is_not_known_is_said(command, tiny, tmp_path):
    words = [f"run={tmp_path / 'run'}", f"model.llm.path={tmp_path / 'gone'}", "--ranks", 1]
    done = command("doctor", "--recipe", tiny, *words)
    assert done.returncode == 0 and "the plan's figures are not known: " in done.stdout


def test_ranks_that_do_not_come_are_named(monkeypatch):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    monkeypatch.setattr(rank, "JOIN_SECONDS", 1.0)
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "3"), ("MASTER_ADDR", "127.0.0.1"),
                        ("MASTER_PORT", str(port))):  # fmt: skip
        monkeypatch.setenv(name, value)
    with pytest.raises(Failure, match="ranks 1, 2 have not come to rank 0 at 127"):
        rank.join()


def test_the_whole_has_an_end():
    code = "import time; from dsasr.doctor.rank import TimeLimit; TimeLimit(0.2); time.sleep(60)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60
    )
    assert done.returncode == rank.LATE and "has not ended within 0.2 s" in done.stderr


@pytest.mark.launcher
def test_two_ranks_under_the_launcher(tiny, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "dsasr.cli", "doctor", "--recipe", str(tiny), "--ranks", "2",
         f"run={tmp_path / 'run'}"],
        capture_output=True, text=True, cwd=ROOT, timeout=300,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode in (0, rank.SHORT), done.stdout + done.stderr
    table = done.stdout
    assert "2 on " in table and "all-reduce" in table and "clocks" in table
    assert "the launcher's last lines" not in table and "Traceback" not in table
    assert "the same on all nodes" in table and list(tmp_path.iterdir()) == []
