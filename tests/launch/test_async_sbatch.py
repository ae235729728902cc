"""slurm/async.sbatch without Slurm: what it starts, and what it makes of exits and signals.

tests/slurm/ does it with Slurm.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "slurm" / "async.sbatch"

SRUN = """#!/bin/bash
# Runs the task once, as rank 1 of 16 on the second node, and notes what it was given.
args=("$@")
while [[ $1 == --* ]]; do shift; done
export SLURM_PROCID=9 SLURM_LOCALID=1 SLURM_NTASKS=16 SLURM_NNODES=2
{ printf '%s ' "${args[@]}"; echo; } >> $NOTES/srun
exec "$@"
"""
PYTHON = """#!/bin/bash
if [[ $1 == -c ]]; then echo "${INSTALLED:?no dsasr}"; exit; fi
trap 'echo stopped >> $NOTES/$branch; exit 0' USR1
branch=$(printf '%s\\n' "$@" | sed -n 's/^branch=//p')
run=$(printf '%s\\n' "$@" | sed -n 's/^run=//p')
echo "$RANK $LOCAL_RANK $WORLD_SIZE $LOCAL_WORLD_SIZE $MASTER_ADDR $MASTER_PORT $*" > $NOTES/$branch
for _ in $(seq ${WAIT:-0}); do sleep 0.05; done
if [[ $branch == "${FAIL:-}" ]]; then exit 3; fi
mkdir -p "$run/$branch"
echo '{"event": "finished", "steps": 4}' > "$run/$branch/events.jsonl"
"""
SCONTROL = """#!/bin/bash
if [[ $1 == show ]]; then echo "${3}1"; echo "${3}2"; exit; fi
echo "$*" > $NOTES/scontrol
kill -TERM -- -$(ps -o pgid= $PPID | tr -d ' ')  # as Slurm ends a job that is requeued
"""


@pytest.fixture
def begin(tmp_path):
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in (("srun", SRUN), ("python", PYTHON), ("scontrol", SCONTROL)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    settings = {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "NOTES": str(tmp_path),
        "SLURM_JOB_ID": "123",
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_NODELIST_HET_GROUP_0": "a",
        "SLURM_JOB_NODELIST_HET_GROUP_1": "b",
    }

    jobs = []

    def run(**variables: str) -> subprocess.Popen:
        jobs.append(subprocess.Popen(
            ["bash", str(SCRIPT)], env={**settings, **variables}, cwd=tmp_path, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        ))  # fmt: skip
        return jobs[-1]

    yield run
    for job in jobs:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(job.pid, signal.SIGKILL)


def test_two_components_with_their_own_rendezvous(begin, tmp_path):
    job = begin(RECIPE="demo", RUN=str(tmp_path / "run"), OVERRIDES="seed=2 monitor.every=5")
    output, _ = job.communicate(timeout=30)
    assert (
        job.returncode == 0 and "pretrain ended with 0" in output and "sft ended with 0" in output
    )
    for branch, host, port in (("pretrain", "a1", 20123), ("sft", "b1", 20124)):
        words = (tmp_path / branch).read_text().split()
        assert words[:6] == ["9", "1", "16", "8", host, str(port)]
        assert f"branch={branch}" in words and "store.late=wait" in words
        assert words[-2:] == ["seed=2", "monitor.every=5"]
    variables = (tmp_path / "srun").read_text()
    assert "--het-group=0" in variables and "--het-group=1" in variables


def requeued(tmp_path) -> list[dict]:
    assert (tmp_path / "scontrol").read_text() == "requeue 123\n"
    return [json.loads(x) for x in (tmp_path / "run" / "requeues.jsonl").read_text().splitlines()]


def test_a_failed_component_stops_the_other_and_the_job_is_requeued(begin, tmp_path):
    job = begin(RECIPE="demo", RUN=str(tmp_path / "run"), FAIL="pretrain", WAIT="20")
    output, _ = job.communicate(timeout=30)
    assert "pretrain ended with 3" in output and "sft ended with 0" in output
    assert [(r["job"], r["start"], r["cause"]) for r in requeued(tmp_path)] == [
        (123, 0, "pretrain ended with 3")
    ]


def test_the_third_failure_in_a_row_ends_the_job(begin, tmp_path):
    variables = {"RECIPE": "demo", "RUN": str(tmp_path / "run"), "FAIL": "sft", "RETRIES": "2"}
    job = begin(**variables)
    job.communicate(timeout=30)
    requeued(tmp_path)
    (tmp_path / "scontrol").unlink()
    job = begin(**variables, SLURM_RESTART_COUNT="1")
    output, _ = job.communicate(timeout=30)
    assert job.returncode == 1 and "2 failures in a row" in output
    assert not (tmp_path / "scontrol").exists()


def test_what_slurm_requeued_by_itself_is_noted(begin, tmp_path):
    job = begin(RECIPE="demo", RUN=str(tmp_path / "run"), SLURM_RESTART_COUNT="1")
    output, _ = job.communicate(timeout=30)
    assert job.returncode == 0 and "finished after 1 requeues" in output
    lines = (tmp_path / "run" / "requeues.jsonl").read_text().splitlines()
    assert [json.loads(x)["cause"] for x in lines] == [
        "node failure or preemption: requeued by Slurm"
    ]


def test_the_signal_before_the_time_limit_reaches_both(begin, tmp_path):
    job = begin(RECIPE="demo", RUN=str(tmp_path / "run"), WAIT="400")
    end = time.monotonic() + 30
    while not all((tmp_path / b).is_file() for b in ("sft", "pretrain")):
        assert job.poll() is None and time.monotonic() < end
        time.sleep(0.05)
    time.sleep(0.2)
    job.send_signal(signal.SIGUSR1)
    job.communicate(timeout=30)
    for branch in ("sft", "pretrain"):
        assert (tmp_path / branch).read_text().endswith("stopped\n")
    assert [r["cause"] for r in requeued(tmp_path)] == ["signal"]


def test_what_is_missing_is_said(begin, tmp_path):
    job = begin(RUN="x")
    assert "set RECIPE" in job.communicate(timeout=30)[0] and job.returncode != 0
    job = begin(RECIPE="demo", RUN=str(tmp_path / "run"), SLURM_SUBMIT_DIR="/tmp")
    assert "call sbatch from its checkout" in job.communicate(timeout=30)[0]
    assert job.returncode == 2


def test_an_installed_package_is_copied_and_run(begin, tmp_path):
    """As from a wheel: ds_configs/ and slurm/ are in the package, beside other packages."""
    site = tmp_path / "site-packages"
    shutil.copytree(ROOT / "dsasr", site / "dsasr", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("ds_configs", "slurm"):
        shutil.copytree(ROOT / name, site / "dsasr" / name)
    (site / "torch").mkdir()
    run = tmp_path / "run"
    for variables in ({"CODE": str(site)}, {"INSTALLED": str(site)}):
        job = begin(RECIPE="demo", RUN=str(run), SLURM_SUBMIT_DIR="/tmp", **variables)
        output, _ = job.communicate(timeout=30)
        assert job.returncode == 0, output
        assert [path.name for path in (run / "code").iterdir()] == ["dsasr"]
        assert (run / "code" / "dsasr" / "ds_configs" / "zero3.json").is_file()
        assert str(run / "code" / "dsasr" / "train.py") in (tmp_path / "sft").read_text()
        shutil.rmtree(run)
