"""What asks a rank to stop, in processes of their own."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dsasr.launch.stop_request import StopRequest

ROOT = Path(__file__).parents[2]
RANK = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
from dsasr.launch.stop_request import EARLY, StopRequest
request = StopRequest()
request.listen(*EARLY)
if sys.argv[1] == "training":
    request.begin_training()
print("ready", flush=True)
while not request.cause:
    time.sleep(0.01)
time.sleep(0.5)  # as long as it saves: whatever else is sent is ignored
print(request.cause, flush=True)
"""


def answers(phase: str, *numbers: int) -> tuple[int, str]:
    """Exit code and last words of a rank that is sent these signals."""
    rank = subprocess.Popen(
        [sys.executable, "-c", RANK, phase], cwd=ROOT, stdout=subprocess.PIPE, text=True,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    assert rank.stdout.readline() == "ready\n"
    for number in numbers:
        rank.send_signal(number)
    return rank.wait(30), rank.stdout.read()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_rank_that_trains_is_asked_to_stop(number):
    assert answers("training", number) == (0, f"{signal.Signals(number).name}\n")


def test_further_signals_do_not_disturb_it():
    code, cause = answers("training", signal.SIGINT, signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1)
    assert code == 0 and cause in ("SIGINT\n", "SIGTERM\n", "SIGUSR1\n")


def test_a_rank_that_loads_ends_at_once_but_stops_before_its_first_step_on_sigusr1():
    assert answers("loading", signal.SIGTERM) == (-signal.SIGTERM, "")
    assert answers("loading", signal.SIGINT)[0] != 0
    assert answers("loading", signal.SIGUSR1) == (0, "SIGUSR1\n")


def test_the_first_cause_counts():
    request = StopRequest()
    for cause in ("dsasr stop", "SIGTERM"):
        request.record(cause)
    assert request.cause == "dsasr stop"


def test_output_that_nobody_reads_asks_to_stop_and_is_no_error():
    code = (
        "import sys\n"
        "from dsasr.launch.stop_request import StopRequest\n"
        "request = StopRequest()\n"
        "with request.guard_output():\n"
        "    sys.stdin.readline()\n"
        "    for _ in range(3):\n"
        "        print('step', flush=True)\n"
        "sys.exit(0 if request.cause == 'the end of what read its output' else 1)\n"
    )
    rank = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    rank.stdout.close()
    rank.communicate(b"go\n", timeout=30)
    assert rank.returncode == 0
