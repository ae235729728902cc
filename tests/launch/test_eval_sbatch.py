"""slurm/eval.sbatch without Slurm."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SRUN = """#!/bin/bash
echo "8 clips: WER 1%"
sleep "${WAIT:-0}"
if [[ -n ${KILLED:-} ]]; then kill -9 $$; fi
exit "${ENDS:-0}"
"""


@pytest.fixture
def begin(tmp_path):
    srun = tmp_path / "bin" / "srun"
    srun.parent.mkdir()
    srun.write_text(SRUN)
    srun.chmod(0o755)
    settings = {"PATH": f"{srun.parent}:{os.environ['PATH']}", "SLURM_SUBMIT_DIR": str(ROOT)}
    settings |= {"RUN": str(tmp_path / "run"), "DATA": "good=a bad=b", "SLURM_ARRAY_TASK_ID": "1"}

    def run(**variables: str) -> subprocess.Popen:
        return subprocess.Popen(
            ["bash", str(ROOT / "slurm" / "eval.sbatch")], env={**settings, **variables}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    return run


def files(tmp_path) -> list[str]:
    return [path.name for path in (tmp_path / "run" / "evaluation").iterdir()]


def test_a_table_appears_whole(begin, tmp_path):
    job = begin()
    assert job.communicate(timeout=30)[0] == "8 clips: WER 1%\n" and job.returncode == 0
    assert files(tmp_path) == ["bad.txt"]


@pytest.mark.parametrize(("variables", "code"), [({"ENDS": "2"}, 2), ({"KILLED": "1"}, 137)])
def test_a_failed_task_leaves_nothing_and_prints_no_command(begin, tmp_path, variables, code):
    job = begin(**variables)
    assert job.communicate(timeout=30)[0] == "" and job.returncode == code
    assert files(tmp_path) == []


def test_a_cancelled_task_leaves_nothing(begin, tmp_path):
    job = begin(WAIT="20")
    end = time.monotonic() + 20
    while not (tmp_path / "run" / "evaluation" / ".bad.txt.tmp").is_file():
        assert time.monotonic() < end
        time.sleep(0.02)
    job.send_signal(signal.SIGTERM)
    job.wait(10)
    assert files(tmp_path) == []
