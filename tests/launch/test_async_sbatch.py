"""slurm/async.sbatch without Slurm: what it starts, and what it makes of exits and signals.

tests/slurm/ does it with Slurm.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
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
if [[ -n ${TOLD:-} ]]; then echo "srun: error: $TOLD" >&2; fi
if [[ -n ${KILLED:-} ]]; then kill -9 $$; fi
{ printf '%s ' "${args[@]}"; echo; } >> $NOTES/srun
exec "$@"
"""
# Not in bash, which cannot trap what is ignored when it starts, as SIGUSR1 is in a task.
PYTHON = f"""#!{sys.executable} -S
import os, signal, sys, time

if sys.argv[1] == "-c":
    print(os.environ.get("INSTALLED") or sys.exit("no dsasr"))
    sys.exit()
if sys.argv[1].endswith("doctor/rank.py"):
    print("          measured\\nshort: clocks: those of b1 are off: start chronyd there")
    sys.exit(int(os.environ.get("EXAMINED", "1")))
words = dict(word.partition("=")[::2] for word in sys.argv)
branch, run, notes = words["branch"], words["run"], os.environ["NOTES"]
names = "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT"
note = open(f"{{notes}}/{{branch}}", "w")
print(*map(os.environ.get, names.split()), *sys.argv[1:], file=note, flush=True)
os.makedirs(f"{{run}}/{{branch}}", exist_ok=True)


def log(event):
    with open(f"{{run}}/{{branch}}/events.jsonl", "w") as file:
        print(event, file=file)


def stop(*_):
    print("stopped", file=note, flush=True)
    if "RECORDS" in os.environ:
        start = os.environ["DSASR_START"]
        log('{{"event": "stopped", "cause": "%s", "start": "%s"}}' % (os.environ["RECORDS"], start))
    os._exit(0)


time.sleep(float(os.environ.get("LOADS", "0")))
signal.signal(signal.SIGUSR1, stop)
time.sleep(float(os.environ.get("WAIT", "0")))
if branch == os.environ.get("FAIL"):
    sys.exit(int(os.environ.get("CODE_OF_FAIL", "3")))
log('{{"event": "finished", "steps": 4}}')
"""
SCONTROL = """#!/bin/bash
if [[ $1 == show && $2 == job ]]; then
  echo "JobId=$3 JobState=${STATE:-RUNNING} Restarts=${RESTARTED:-${SLURM_RESTART_COUNT:-0}}"; exit
fi
if [[ $1 == show ]]; then echo "${3}1"; echo "${3}2"; exit; fi
echo "$*" > $NOTES/scontrol
kill -TERM -- -$(ps -o pgid= $PPID | tr -d ' ')  # as Slurm ends a job that is requeued
"""
SQUEUE = """#!/bin/bash
case "$*" in
  *"-j 7 "*) echo RUNNING ;;
  *"-j 8 "*) echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1 ;;
esac
"""


@pytest.fixture
def begin(tmp_path):
    programs = tmp_path / "bin"
    programs.mkdir()
    stubs = {"srun": SRUN, "python": PYTHON, "scontrol": SCONTROL, "squeue": SQUEUE}
    for name, text in stubs.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    settings = {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "NOTES": str(tmp_path),
        "SLURM_JOB_ID": "123",
        "DOCTOR": "off",
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


@pytest.mark.parametrize(
    ("doctor", "examined", "code", "trained"),
    [("warn", "1", 0, True), ("stop", "1", 2, False), ("stop", "0", 0, True)],
)
def test_the_machines_are_examined_first(begin, tmp_path, doctor, examined, code, trained):
    run = tmp_path / "run"
    job = begin(RECIPE="demo", RUN=str(run), DOCTOR=doctor, EXAMINED=examined)
    output, _ = job.communicate(timeout=30)
    assert job.returncode == code and (tmp_path / "sft").is_file() == trained
    assert ("short: clocks: those of b1 are off" in output) == (examined == "1")
    assert ("error: the machines fall short" in output) == (code == 2)
    assert "measured" in (run / "logs/123.0-pretrain-doctor.txt").read_text()
    assert not (run / "job.lock").exists() and not (run / "requeues.jsonl").exists()
    calls = (tmp_path / "srun").read_text().split("--het-group=")
    first = [call for call in calls if "doctor/rank.py" in call]
    assert first[0].startswith("0 ") and "branch=pretrain" in first[0]
    assert len(first) == (1 if code else 2)


def test_an_unknown_way_to_examine_is_refused(begin, tmp_path):
    job = begin(RECIPE="demo", RUN=str(tmp_path / "run"), DOCTOR="on")
    assert "DOCTOR=on" in job.communicate(timeout=30)[0] and job.returncode == 2


def requeued(tmp_path) -> list[dict]:
    assert (tmp_path / "scontrol").read_text() == "requeue 123\n"
    return [json.loads(x) for x in (tmp_path / "run" / "requeues.jsonl").read_text().splitlines()]


def test_a_failed_component_stops_the_other_and_the_job_is_requeued(begin, tmp_path):
    job = begin(RECIPE="demo", RUN=str(tmp_path / "run"), FAIL="pretrain", WAIT="1")
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


def until_started(job, tmp_path) -> None:
    end = time.monotonic() + 30
    while not all((tmp_path / b).is_file() for b in ("sft", "pretrain")):
        assert job.poll() is None and time.monotonic() < end
        time.sleep(0.05)


def test_a_job_that_slurm_has_requeued_itself_is_no_error(begin, tmp_path):
    variables = {"STATE": "COMPLETING", "RESTARTED": "1", "TOLD": "Node failure on b2"}
    job = begin(RECIPE="demo", RUN=str(tmp_path / "run"), FAIL="sft", **variables)
    end = time.monotonic() + 30
    while not (tmp_path / "run" / "requeues.jsonl").exists():
        assert job.poll() is None and time.monotonic() < end
        time.sleep(0.05)
    assert "requeued (sft ended with 3: node failure on b2)" in until_line(job, "requeued (")
    assert not (tmp_path / "scontrol").exists() and (tmp_path / "run" / "job.lock").exists()


def until_line(job, start: str) -> str:
    return next(line for line in job.stdout if line.startswith(start))


def test_the_signal_before_the_time_limit_reaches_both(begin, tmp_path):
    job = begin(RECIPE="demo", RUN=str(tmp_path / "run"), WAIT="20")
    until_started(job, tmp_path)
    time.sleep(0.3)
    job.send_signal(signal.SIGUSR1)
    job.communicate(timeout=30)
    for branch in ("sft", "pretrain"):
        assert (tmp_path / branch).read_text().endswith("stopped\n")
    assert [r["cause"] for r in requeued(tmp_path)] == ["signal"]


def test_a_job_that_its_time_limit_overtook_is_requeued(begin, tmp_path):
    limit = "*** STEP 1.0 ON b1 CANCELLED AT 2026-01-01T00:00:00 DUE TO TIME LIMIT ***"
    job = begin(RECIPE="demo", RUN=str(tmp_path / "run"), WAIT="20", STATE="COMPLETING", TOLD=limit)
    until_started(job, tmp_path)
    time.sleep(0.3)
    job.send_signal(signal.SIGUSR1)
    job.communicate(timeout=30)
    assert [r["cause"] for r in requeued(tmp_path)] == ["signal"]


def test_a_signal_before_the_ranks_listen_is_repeated(begin, tmp_path):
    job = begin(RECIPE="demo", RUN=str(tmp_path / "run"), LOADS="3", WAIT="60")
    until_started(job, tmp_path)
    job.send_signal(signal.SIGUSR1)
    job.communicate(timeout=40)
    assert [r["cause"] for r in requeued(tmp_path)] == ["signal"]


@pytest.mark.parametrize(
    ("state", "records", "last"),
    [
        ("COMPLETING", "SIGTERM", "cancelled: not requeued"),
        ("RUNNING", "dsasr stop", "stopped by dsasr stop: not requeued"),
    ],
)
def test_what_a_user_ended_is_not_requeued(begin, tmp_path, state, records, last):
    job = begin(RECIPE="demo", RUN=str(tmp_path / "run"), WAIT="20", RECORDS=records, STATE=state)
    until_started(job, tmp_path)
    time.sleep(0.3)
    job.send_signal(signal.SIGTERM)
    output, _ = job.communicate(timeout=30)
    assert job.returncode == 0 and last in output
    assert not (tmp_path / "scontrol").exists() and not (tmp_path / "run" / "job.lock").exists()


def test_a_job_that_is_asked_to_stop_before_it_trains_ends(begin, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "job.stop").write_text("123\n")
    output, _ = begin(RECIPE="demo", RUN=str(tmp_path / "run")).communicate(timeout=30)
    assert "stopped by dsasr stop" in output and not (tmp_path / "sft").exists()
    (tmp_path / "run" / "job.stop").write_text("99\n")  # another job was meant
    output, _ = begin(RECIPE="demo", RUN=str(tmp_path / "run")).communicate(timeout=30)
    assert "finished after 0 requeues" in output


def test_a_signal_that_a_rank_recorded_is_one_and_an_end_without_is_a_failure(begin, tmp_path):
    """A part that ends with 0 has not trained to the end for that."""
    variables = {"RECIPE": "demo", "RUN": str(tmp_path / "run"), "FAIL": "sft"}
    job = begin(**variables, CODE_OF_FAIL="0")
    job.communicate(timeout=30)
    job = begin(**variables, WAIT="20", RECORDS="SIGUSR1", SLURM_RESTART_COUNT="1")
    (tmp_path / "pretrain").unlink()
    (tmp_path / "sft").unlink()
    until_started(job, tmp_path)
    time.sleep(0.3)
    for branch in ("pretrain", "sft"):  # Slurm signals tasks, not the script
        pid = subprocess.run(
            ["pgrep", "-f", f"run={tmp_path}/run branch={branch}"], capture_output=True, text=True
        ).stdout.split()[-1]
        os.kill(int(pid), signal.SIGUSR1)
    job.communicate(timeout=30)
    causes = [r["cause"] for r in requeued(tmp_path)]
    assert causes == ["sft ended with 0 before it was finished", "signal"]


@pytest.mark.parametrize(
    ("told", "cause", "node"),
    [
        ("Node failure on b2", "node failure on b2", "b2"),
        ("b2: task 9: Bus error (core dumped)", "b2, task 9: Bus error (core dumped)", "b2"),
        ("b2: tasks 8-9: Exited with exit code 3", "b2, tasks 8-9: Exited with exit code 3", ""),
        ("b1: task 3: Terminated", "", ""),  # by srun, after another one had failed
    ],
)
def test_the_node_that_failed_is_named(begin, tmp_path, told, cause, node):
    job = begin(RECIPE="demo", RUN=str(tmp_path / "run"), FAIL="sft", TOLD=told)
    output, _ = job.communicate(timeout=30)
    assert f"srun: error: {told}" in output
    row = requeued(tmp_path)[0]
    assert row["cause"] == "sft ended with 3" + (f": {cause}" if cause else "")
    assert row["node"] == node


def test_the_exception_of_a_rank_is_told(begin, tmp_path):
    logs = tmp_path / "run" / "logs"
    logs.mkdir(parents=True)
    lines = ["Traceback (most recent call last):", 'torch.OutOfMemoryError: CUDA "out" of memory',
             "RuntimeError: [gloo] Connection closed by peer", "[12/42] step"]  # fmt: skip
    (logs / "123.0-sft-node0.log").write_text("\n".join(lines))
    begin(RECIPE="demo", RUN=str(tmp_path / "run"), FAIL="sft").communicate(timeout=30)
    cause = "sft ended with 3 (torch.OutOfMemoryError: CUDA out of memory)"
    assert [r["cause"] for r in requeued(tmp_path)] == [cause]


def test_a_killed_srun_prints_no_command(begin, tmp_path):
    job = begin(RECIPE="demo", RUN=str(tmp_path / "run"), KILLED="1")
    output, _ = job.communicate(timeout=30)
    assert "pretrain ended with 137" in output
    assert "Killed" not in output and "het-group" not in output


def test_a_port_that_is_taken_is_left_alone(begin, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        variables = {"RECIPE": "demo", "RUN": str(tmp_path / "run"), "MASTER_ADDR": "127.0.0.1"}
        begin(**variables, PORT=str(port)).communicate(timeout=30)
    assert (tmp_path / "pretrain").read_text().split()[5] == str(port + 2)
    assert (tmp_path / "sft").read_text().split()[5] == str(port + 1)


def test_a_run_belongs_to_one_job(begin, tmp_path):
    run = tmp_path / "run"
    begin(RECIPE="demo", RUN=str(run)).communicate(timeout=30)
    assert not (run / "job.lock").exists()
    (run / "code" / "mark").touch()
    (run / "job.lock").write_text("7 node then\n")
    job = begin(RECIPE="demo", RUN=str(run))
    output, _ = job.communicate(timeout=30)
    assert job.returncode == 2 and f"error: {run} belongs to job 7 (RUNNING): wait" in output
    assert "afterany:7" in output and f"`dsasr stop {run}`" in output
    assert (run / "code" / "mark").exists()
    (run / "job.lock").write_text("8 node then\n")  # one that Slurm does not know
    job = begin(RECIPE="demo", RUN=str(run))
    output, _ = job.communicate(timeout=30)
    assert job.returncode == 0 and not (run / "job.lock").exists(), output


def test_a_folder_whose_logs_slurm_would_put_elsewhere_is_refused(begin, tmp_path):
    job = begin(RECIPE="demo", RUN=str(tmp_path / "100%"))
    assert "give another folder" in job.communicate(timeout=30)[0] and job.returncode == 2
    assert not (tmp_path / "100%").exists()


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
