"""The end of a rank."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Gloo's threads get the processor only when the main thread does not want it, so that they hold on
# to what they worked on until the process ends. The group stays referenced, as it is by DeepSpeed.
LATE = """
import atexit, os, sys
import torch
import torch.distributed as dist
from dsasr.utils import distributed

dist.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=0, world_size=1)
group = dist.new_group([0])
dist.all_reduce(torch.ones(2), group=group)
core = {min(os.sched_getaffinity(0))}
for thread in map(int, os.listdir("/proc/self/task")):
    os.sched_setaffinity(thread, core)
    if thread != os.getpid():
        os.sched_setscheduler(thread, os.SCHED_IDLE, os.sched_param(0))
for _ in range(50):
    mine = torch.ones(2)
    mine.known_to_python = True
    dist.all_reduce(mine, group=group)
    del mine
atexit.register(print, "registered")
distributed.destroy_process_group = lambda: None
distributed.end_process(3)
"""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs Linux's /proc")
def test_a_process_ends_with_its_code_while_gloo_still_holds_tensors(tmp_path):
    command = [sys.executable, "-c", LATE, tmp_path / "store"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stdout) == (3, "registered\n"), ended.stderr
