"""The end of a rank, and what the ranks agree on without a collective."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch.distributed as dist

from dsasr.utils import distributed

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


FLAGS = """
import os, sys
import torch.distributed as dist
from dsasr.utils import distributed

rank = int(sys.argv[2])
later = distributed.DelayedAnyRank()
assert later(True) is True  # one rank: at once
dist.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=rank, world_size=2)
later = distributed.DelayedAnyRank()
raised = [later(rank == 1 and call == 2) for call in range(5)]
settled = [later.settle(), later(rank == 0), later.settle(), later.settle()]
print(raised, settled, distributed.any_rank(rank == 1))
distributed.end_process()
"""


def test_a_flag_of_one_rank_reaches_all_at_the_next_call(tmp_path):
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", FLAGS, tmp_path / "store", str(rank)],
            cwd=ROOT, stdout=subprocess.PIPE, text=True,
        )
        for rank in (0, 1)
    ]  # fmt: skip
    raised, settled = [False, False, False, True, False], [False, False, True, False]
    for rank in ranks:
        assert rank.communicate(timeout=120)[0] == f"{raised} {settled} True\n"
        assert rank.returncode == 0


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs Linux's /proc")
def test_a_process_ends_with_its_code_while_gloo_still_holds_tensors(tmp_path):
    command = [sys.executable, "-c", LATE, tmp_path / "store"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stdout) == (3, "registered\n"), ended.stderr


@pytest.fixture
def two_ranks(monkeypatch):
    """``two_ranks(reasons, seconds)``: what `failures` returns or raises on each of two ranks."""
    store, own = dist.HashStore(), threading.local()
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: store)
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "rank", lambda: own.rank)

    def run(reasons: dict[int, str], name: str, seconds: float) -> dict:
        found = {}

        def one(rank: int, reason: str) -> None:
            own.rank = rank
            try:
                found[rank] = distributed.failures(reason, name, seconds)
            except TimeoutError as error:
                found[rank] = error

        threads = [threading.Thread(target=one, args=item) for item in reasons.items()]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return found

    return run


@pytest.mark.parametrize("reasons", [["", "out of memory"], ["", ""]])
def test_ranks_learn_of_each_others_failures(two_ranks, reasons):
    assert two_ranks(dict(enumerate(reasons)), "a", 20) == {0: reasons, 1: reasons}


def test_a_rank_that_fails_alone_is_not_waited_for(two_ranks):
    (error,) = two_ranks({1: "out of memory"}, "a", 0.3).values()
    assert isinstance(error, TimeoutError) and "not every rank has ended it in 0.3 s" in str(error)
