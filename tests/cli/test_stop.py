"""`dsasr stop`."""

from __future__ import annotations

import threading

from dsasr.launch import slurm
from dsasr.launch.run_lock import RunLock
from dsasr.launch.stop_request import StopRequest


def test_both_jobs_of_a_run_are_asked_to_stop(command, tmp_path):
    requests = {name: StopRequest() for name in ("pretrain", "sft")}
    locks = [RunLock(tmp_path / name, request) for name, request in requests.items()]
    ends = threading.Thread(target=lambda: [_end(lock) for lock in locks])
    ends.start()
    done = command("stop", tmp_path, "--wait")
    ends.join()
    assert done.returncode == 0
    assert [line.split(":")[0] for line in done.stdout.splitlines()] == [
        str(tmp_path / name) for name in requests
    ]
    assert {r.cause for r in requests.values()} == {"dsasr stop"}
    done = command("stop", tmp_path)
    assert done.returncode == 2 and "nothing trains in" in done.stderr


def _end(lock: RunLock) -> None:
    while not lock._request.cause:
        lock._released.wait(0.05)
    lock.release()


def test_a_slurm_job_between_two_starts_is_asked_too(command, tmp_path):
    (tmp_path / slurm.JOB_LOCK).write_text("123 cluster\n")
    done = command("stop", tmp_path)
    assert done.returncode == 0 and "Slurm job 123" in done.stdout and "scancel 123" in done.stdout
    assert (tmp_path / slurm.JOB_STOP).read_text() == "123\n"
    assert command("stop", tmp_path / "missing").returncode == 2
