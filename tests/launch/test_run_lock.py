"""A run folder's lock: two jobs, dead ones, those that are elsewhere, and requests to stop."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from dsasr.launch import run_lock
from dsasr.launch.run_lock import LOCK, LOST, STOP, Owner, RunLock, ask_to_stop
from dsasr.launch.stop_request import StopRequest
from dsasr.utils.errors import UserError

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    for name, seconds in (("BEAT", 0.1), ("STALE", 1.5), ("POLL", 0.02)):
        monkeypatch.setattr(run_lock, name, seconds)


@pytest.fixture
def take(tmp_path):
    """``take()``: another `RunLock` of the same folder, released at the test's end."""
    locks = []

    def lock(**options) -> RunLock:
        locks.append(RunLock(tmp_path / "run", options.pop("request", StopRequest()), **options))
        return locks[-1]

    yield lock
    for held in locks:
        held.release()


def silence(lock: RunLock) -> None:
    """As if its machine had died."""
    lock._released.set()
    lock._thread.join()


def elsewhere(monkeypatch) -> None:
    """From here on locks that are held already are another machine's."""
    monkeypatch.setattr(run_lock, "_machine", lambda: "another machine")


def test_the_second_job_is_told_who_trains_there(take, tmp_path, monkeypatch):
    monkeypatch.setenv("DSASR_START", "123.2")
    first = take()
    with pytest.raises(UserError) as refused:
        take()
    line = str(refused.value)
    assert f"Slurm job 123, process {first.owner.pid} on {first.owner.host} since 20" in line
    assert f"`dsasr stop {tmp_path / 'run'}`" in line and "run=FOLDER" in line and "\n" not in line
    first.release()
    take().release()
    assert not list((tmp_path / "run").iterdir())


def test_a_dead_process_of_this_machine_holds_nothing(take, tmp_path):
    code = (
        "import os, sys; from pathlib import Path\n"
        "from dsasr.launch.run_lock import RunLock, StopRequest\n"
        "RunLock(Path(sys.argv[1]), StopRequest()); os._exit(0)\n"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "run"], cwd=ROOT, check=True)
    dead, began = Owner.read(tmp_path / "run"), time.monotonic()
    assert dead.lives is False
    lock = take()
    assert time.monotonic() - began < 1.0 and Owner.read(tmp_path / "run") == lock.owner


def test_a_later_process_of_the_same_id_holds_nothing(take, tmp_path):
    first = take()
    silence(first)
    fields = {**vars(first.owner), "pid_started": "1"}
    (tmp_path / "run" / LOCK).write_text(json.dumps(fields))
    assert take().owner.token != first.owner.token


def test_a_job_elsewhere_is_known_by_its_beat(take, monkeypatch, capsys):
    first = take()
    elsewhere(monkeypatch)
    with pytest.raises(UserError, match="is trained by"):
        take()
    silence(first)
    began = time.monotonic()
    take()
    assert time.monotonic() - began > 1.5
    assert "may be gone, 1.5 s will tell: waiting" in capsys.readouterr().out


def test_of_those_that_take_over_one_wins(take, monkeypatch, tmp_path):
    silence(take())
    elsewhere(monkeypatch)
    won, refused = [], []

    def try_it() -> None:
        try:
            won.append(take())
        except UserError as error:
            refused.append(error)

    threads = [threading.Thread(target=try_it) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert (len(won), len(refused)) == (1, 3)
    assert Owner.read(tmp_path / "run") == won[0].owner
    assert not list((tmp_path / "run").glob("*.taken"))


def test_a_torn_lock_is_taken_over_when_nobody_beats(take, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / LOCK).write_text('{"token": ')
    lock = take()
    assert Owner.read(tmp_path / "run") == lock.owner


def test_a_job_whose_lock_was_taken_over_ends(take, monkeypatch, capsys):
    codes, lost = [], threading.Event()
    first = take(lost=lambda code: (codes.append(code), lost.set()))
    fields = {**vars(first.owner), "token": "other", "host": "there"}
    (first.folder / LOCK).write_text(json.dumps(fields))
    assert lost.wait(10) and codes[0] == LOST
    assert "was taken over by" in capsys.readouterr().err
    first.release()
    assert Owner.read(first.folder).token == "other"  # it stays the other's
    (first.folder / LOCK).unlink()


def test_a_lock_that_was_removed_is_made_again(take):
    lock = take()
    (lock.folder / LOCK).unlink()
    end = time.monotonic() + 10
    while Owner.read(lock.folder) != lock.owner:
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_request_to_stop_reaches_the_job_once(take):
    request = StopRequest()
    assert ask_to_stop(Path("/nowhere")) is None
    lock = take(request=request)
    assert ask_to_stop(lock.folder) == lock.owner
    end = time.monotonic() + 10
    while not request.cause and time.monotonic() < end:
        time.sleep(0.01)
    assert request.cause == "dsasr stop"
    lock.release()
    assert not (lock.folder / STOP).exists() and ask_to_stop(lock.folder) is None
    later = StopRequest()
    (lock.folder / STOP).write_text(json.dumps({"token": lock.owner.token}))  # left by a dead job
    take(request=later)
    time.sleep(0.2)
    assert not later.cause


def test_a_job_that_stops_is_waited_for(take, capsys):
    request = StopRequest()
    first = take(request=request)
    request.record("SIGTERM")
    time.sleep(0.3)
    timer = threading.Timer(0.5, first.release)
    timer.start()
    second = take()
    assert Owner.read(second.folder) == second.owner
    assert "which is stopping: waiting" in capsys.readouterr().out


@pytest.mark.launcher
def test_of_two_jobs_in_one_folder_one_trains(start, tmp_path):
    jobs = [start(f"run={tmp_path / 'run'}", world=2) for _ in range(2)]
    codes = [job.wait() for job in jobs]
    assert sorted(codes) == [[0, 0], [2, 2]], [job.output[-2000:] for job in jobs]
    refused = jobs[codes.index([2, 2])].output
    errors = [line for line in refused.splitlines() if line.startswith("error: ")]
    assert errors and all("is trained by process" in line for line in errors)
    assert "Traceback" not in refused
