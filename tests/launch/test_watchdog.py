"""The watchdog alone, and on a job of which one rank is stopped."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from dsasr.launch.watchdog import HUNG, Note, Watchdog, WatchdogConfig, report
from dsasr.utils.errors import UserError

ROOT = str(Path(__file__).parents[2])


class Stopped:
    """Records exit codes in place of ending the process."""

    def __init__(self):
        self.codes, self.event = [], threading.Event()

    def __call__(self, code: int) -> None:
        self.codes.append(code)
        self.event.set()


def note(rank: int, doing: str = "step", step: int = 5) -> Note:
    return Note(rank, doing, "joint", step, ("a", "b"), 30.0, " at run.py:7", "host")


def test_ranks_that_wait_are_named_and_the_silent_one_is_suspected(tmp_path, capsys):
    stopped = [Stopped(), Stopped()]
    dogs = [
        Watchdog(tmp_path, WatchdogConfig(0.5), rank, 3, "s", stopped[rank]) for rank in range(2)
    ]
    dogs[0].at("step", "ia_sft", 14, ("u1", "u2", "u3", "u4", "u5"))
    dogs[1].at("step", "ia_sft", 14, ("v1",))
    dogs[1].at("checkpoint")  # stage, step and samples stay
    assert all(s.event.wait(20) for s in stopped)
    assert [s.codes for s in stopped] == [[HUNG], [HUNG]]
    output = capsys.readouterr().out
    assert output.count("no progress for 0.5 s") == 1
    assert "stage ia_sft, step 14, in step for" in output
    assert "last samples u1, u2, u3, … (5)" in output
    assert "in checkpoint for" in output and "last samples v1" in output
    assert "rank 2: no word" in output and "suspected: rank 2" in output
    assert "suspected: rank 2" in (tmp_path / "alarms" / "s" / "report.txt").read_text()


def test_progress_keeps_it_quiet_and_another_start_is_not_stopped_by_an_old_alarm(tmp_path):
    (tmp_path / "alarms" / "old").mkdir(parents=True)
    stopped = Stopped()
    dog = Watchdog(tmp_path, WatchdogConfig(0.6), 0, 1, "new", stopped)
    for _ in dog.each(range(10), "evaluation"):
        time.sleep(0.1)
    dog.close()
    time.sleep(0.8)
    assert not stopped.codes and not (tmp_path / "alarms" / "new").exists()
    never = Watchdog(tmp_path, WatchdogConfig(0, 0), 0, 1, "none", stopped)
    never.at("step")
    assert "watchdog" not in [t.name for t in threading.enumerate()]
    with pytest.raises(UserError, match="at least 0"):
        WatchdogConfig(-1)
    with pytest.raises(UserError, match="start_seconds"):
        WatchdogConfig(start_seconds=-1)


def test_at_the_start_an_old_alarm_is_ignored_and_a_new_one_ends_all(tmp_path, capsys):
    """No process group yet, and the folder of an earlier start that ended the same way."""
    old = tmp_path / "alarms" / "start"
    old.mkdir(parents=True)
    for name in ("rank-00000.json", "rank-00002.json", "report.txt", "reporter"):
        (old / name).write_text("{}")
        os.utime(old / name, (1e9, 1e9))
    stopped = [Stopped(), Stopped()]
    dogs = [Watchdog(tmp_path, WatchdogConfig(60, 4.0), r, 3, stop=stopped[r]) for r in range(2)]
    dogs[0].at("start")
    time.sleep(2.0)
    assert not any(s.codes for s in stopped)
    dogs[1].at("start")  # a late one, whose own time would be up later: rank 0's alarm is its too
    assert all(s.event.wait(60) for s in stopped)
    output = capsys.readouterr().out
    assert output.count("no progress for 4 s") == 1
    assert "in start for" in output and "suspected: rank 2\n" in output


def test_once_the_ranks_have_met_the_alarm_is_this_starts(tmp_path):
    stopped = Stopped()
    dog = Watchdog(tmp_path, WatchdogConfig(60, 1.0), 0, 1, stop=stopped)
    dog.at("start")
    dog.set_start("now")
    dog.at("loading")
    assert stopped.event.wait(60)
    assert "in loading" in (tmp_path / "alarms" / "now" / "report.txt").read_text()


def test_suspected_ranks():
    alike = [note(0), note(1), note(2)]
    assert not any("suspected" in line for line in report(alike, 3, 30))
    assert report([*alike[:2], note(2, "data")], 3, 30)[-1] == "suspected: rank 2"
    # Two ranks, no majority: the one that is behind.
    assert report([note(0, "step", 6), note(1, "step", 5)], 2, 30)[-1] == "suspected: rank 1"
    assert report([], 1, 30)[-1] == "suspected: rank 0"


def test_a_job_that_was_suspended_goes_on(tmp_path):
    code = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from dsasr.launch.watchdog import Watchdog, WatchdogConfig\n"
        f"dog = Watchdog(Path({str(tmp_path)!r}), WatchdogConfig(4), 0, 1, 's')\n"
        "dog.at('step')\n"
        "print('begun', flush=True)\n"
        "for _ in range(10):\n"
        "    time.sleep(0.1)\n"
        "sys.exit(3)\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": ROOT}
    )
    assert child.stdout.readline() == b"begun\n"
    child.send_signal(signal.SIGSTOP)
    time.sleep(4.5)
    child.send_signal(signal.SIGCONT)
    assert child.wait(60) == 3


@pytest.mark.launcher
def test_a_stopped_rank_ends_the_job_by_name(start, tmp_path):
    folder = tmp_path / "run"
    program = Path(ROOT) / "tests" / "programs" / "stopped_rank.py"
    job = start(f"run={folder}", "checkpoint.every_steps=0", program=program)
    assert job.ranks[0].wait(120) == HUNG, job.output[-3000:]
    output = [x for x in job.output.splitlines() if x.startswith("watchdog: ")]
    assert "no progress for 3 s" in output[0] and "rank 0 on " in output[1]
    assert "stage pretrain, step 2" in output[1]
    assert "last samples train" in output[1] and ".py:" in output[1]
    assert output[-1] == "watchdog: suspected: rank 1"


@pytest.mark.launcher
def test_a_rank_that_never_starts_ends_the_job_by_name(tiny, tmp_path):
    """Rank 0 of two, alone at the rendezvous: no process group is ever there."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    settings |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    settings |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": ROOT}
    command = [sys.executable, str(Path(ROOT) / "dsasr" / "train.py"), "--recipe", str(tiny)]
    done = subprocess.run(
        [*command, f"run={tmp_path / 'run'}", "watchdog.start_seconds=4"],
        env={**os.environ, **settings}, capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert done.returncode == HUNG, done.stdout[-2000:] + done.stderr[-2000:]
    output = [x for x in done.stdout.splitlines() if x.startswith("watchdog: ")]
    assert "no progress for 4 s" in output[0]
    assert "rank 0 on " in output[1] and "in start for" in output[1]
    assert output[-2] == "watchdog: suspected: rank 1"
    assert output[-1].endswith(f"did all start, and do they reach 127.0.0.1:{port}?")
