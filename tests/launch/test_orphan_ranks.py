"""Ranks end with their launcher."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dsasr.checkpoint.locate import checkpoint_name, list_checkpoints
from dsasr.launch import orphan_ranks
from dsasr.tracking.run_log import read_events

ROOT = str(Path(__file__).parents[2])
RANK = """
import os, sys, time
from dsasr.launch.orphan_ranks import end_with_launcher
from dsasr.launch.stop_request import StopRequest
request = StopRequest()
watching = end_with_launcher(request)
print(os.getpid(), watching is not None, flush=True)
if len(sys.argv) > 1:  # a rank that trains, and saves for longer than a rank that loads may live
    request.begin_training()
    while not request.cause:
        time.sleep(0.05)
    request.saving = True
    time.sleep(2)
    open(sys.argv[1], "w").write(request.cause)
    os._exit(0)
time.sleep(60)
"""
PARENT = """
import subprocess, sys
subprocess.Popen([sys.executable, "-c", *sys.argv[3:]]).wait()
"""
LAUNCHER = [sys.executable, "-c", PARENT, orphan_ranks.LAUNCH, "--node_rank=0", RANK]


def gone(process: int, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] in "ZX":
                return True
        except OSError:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.skipif(not Path("/proc/self/stat").is_file(), reason="needs Linux's /proc")
@pytest.mark.parametrize("launched", [True, False])
def test_a_rank_ends_with_its_launcher_and_with_nobody_else(launched):
    settings = {
        k: v for k, v in os.environ.items() if k not in (orphan_ranks.DEEPSPEED, orphan_ranks.TORCH)
    }
    settings |= {"PYTHONPATH": ROOT} | ({"CROSS_RANK": "0"} if launched else {})
    parent = subprocess.Popen(LAUNCHER, stdout=subprocess.PIPE, text=True, env=settings)
    process, watching = parent.stdout.readline().split()
    assert watching == str(launched)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    try:
        assert gone(int(process), 30 if launched else 2) == launched
    finally:
        if not gone(int(process), 0.1):
            os.kill(int(process), signal.SIGKILL)


@pytest.mark.skipif(not Path("/proc/self/stat").is_file(), reason="needs Linux's /proc")
def test_a_rank_that_trains_saves_first(tmp_path):
    settings = {**os.environ, "PYTHONPATH": ROOT, "CROSS_RANK": "0"}
    saved = tmp_path / "saved"
    parent = subprocess.Popen([*LAUNCHER, str(saved)], stdout=subprocess.PIPE, env=settings)
    process = int(parent.stdout.readline().split()[0])
    parent.kill()
    parent.wait()
    parent.stdout.close()  # nobody reads what the rank prints either
    assert gone(process, 30)
    assert saved.read_text() == "the end of its launcher"


@pytest.mark.skipif(not Path("/proc/self/stat").is_file(), reason="needs Linux's /proc")
@pytest.mark.parametrize(("above", "lives"), [
    ([], False),  # the launcher was killed before the rank looked
    ([orphan_ranks.LAUNCH, "--node_rank=0"], True),
    ([orphan_ranks.LAUNCH], False),  # on one machine: the `deepspeed` command was
])  # fmt: skip
def test_launchers_that_ended_before_the_rank_looked(above, lives):
    code = (
        "import subprocess, sys; sys.exit(subprocess.call([sys.executable, '-c', "
        "'from dsasr.launch.orphan_ranks import *;"
        " end_with_launcher(StopRequest()); os._exit(0)']))"
    )
    settings = {**os.environ, "PYTHONPATH": ROOT, "CROSS_RANK": "0"}
    done = subprocess.run([sys.executable, "-c", code, *above], env=settings)
    assert done.returncode == (0 if lives else orphan_ranks.ORPHANED)


@pytest.mark.slow
@pytest.mark.launcher
@pytest.mark.parametrize("target", ["deepspeed", "group", "ctrl-c"])
def test_a_run_saves_when_its_launcher_is_terminated(tiny, tmp_path, target):
    run, log = tmp_path / "run", tmp_path / "log"
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2"]
    command += ["--master_port", "29641", f"{ROOT}/dsasr/train.py", "--recipe", str(tiny)]
    settings = {**os.environ, "PYTHONPATH": ROOT, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    with open(log, "w") as out:
        job = subprocess.Popen(
            [*command, f"run={run}", "checkpoint.every_steps=0", "monitor.every=1000"],
            env=settings, stdout=out, stderr=out, start_new_session=True,
        )  # fmt: skip
    end = time.monotonic() + 240
    while "stage ia_sft starts" not in log.read_text():
        assert job.poll() is None and time.monotonic() < end, log.read_text()[-3000:]
        time.sleep(0.05)
    if target == "deepspeed":
        job.terminate()
    else:
        os.killpg(job.pid, signal.SIGINT if target == "ctrl-c" else signal.SIGTERM)
    job.wait()
    end = time.monotonic() + 120
    while read_events(run)[-1]["event"] != "stopped":
        assert time.monotonic() < end, log.read_text()[-3000:]
        time.sleep(0.1)
    stopped = read_events(run)[-1]
    assert (
        stopped["cause"]
        in {
            "deepspeed": ("the end of its launcher",),
            "group": ("SIGTERM",),
            "ctrl-c": ("SIGINT", "SIGTERM"),  # the launcher sends the second
        }[target]
    )
    assert list_checkpoints(run / "checkpoints")[-1].name == checkpoint_name(stopped["steps"])


def test_the_command_above_the_launcher_counts_only_if_it_is_deepspeed(monkeypatch):
    monkeypatch.setattr(orphan_ranks, "parent_of", lambda process: 77)
    monkeypatch.setattr(orphan_ranks, "_words", lambda process: ["/bin/bash", "-i"])
    assert orphan_ranks.parents() == (os.getppid(), 0)
    words = ["python", "/venv/bin/deepspeed", "train.py"]
    monkeypatch.setattr(orphan_ranks, "_words", lambda process: words)
    assert orphan_ranks.parents() == (os.getppid(), 77)
