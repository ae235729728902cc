"""Ranks end with their launcher."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dsasr.launch import orphan_ranks

ROOT = str(Path(__file__).parents[2])
RANK = """
import os, sys, time
from dsasr.launch.orphan_ranks import end_with_launcher
watching = end_with_launcher()
print(os.getpid(), watching is not None, flush=True)
time.sleep(60)
"""
PARENT = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', sys.argv[1]]).wait()"


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
    settings = {k: v for k, v in os.environ.items() if k not in orphan_ranks.LAUNCHERS}
    settings |= {"PYTHONPATH": ROOT} | ({"CROSS_RANK": "0"} if launched else {})
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, RANK], stdout=subprocess.PIPE, text=True, env=settings
    )
    process, watching = parent.stdout.readline().split()
    assert watching == str(launched)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    try:
        assert gone(int(process), 30 if launched else 2) == launched
    finally:
        if not gone(int(process), 0.1):
            os.kill(int(process), signal.SIGKILL)


def test_the_command_above_the_launcher_counts_only_if_it_is_deepspeed(monkeypatch):
    monkeypatch.setattr(orphan_ranks, "parent_of", lambda process: 77)
    monkeypatch.setattr(orphan_ranks, "_command", lambda process: "/bin/bash -i")
    assert orphan_ranks.parents() == (os.getppid(), 0)
    monkeypatch.setattr(
        orphan_ranks, "_command", lambda process: "python /venv/bin/deepspeed train.py"
    )
    assert orphan_ranks.parents() == (os.getppid(), 77)
