"""What all tests share: the shared recordings, and programs started by the deepspeed launcher."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
RECORDINGS = ROOT.parent / "shared" / "data"


@pytest.fixture(scope="session")
def recordings() -> Path:
    """Real recordings beside the checkout; tests that need them are skipped without."""
    if not RECORDINGS.is_dir():
        pytest.skip("no real recordings beside this checkout")
    return RECORDINGS


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="session")
def launch():
    """``launch(program, *arguments, ranks=2)``: run it under the deepspeed launcher on the CPU.

    Returns the finished process with its output; a launcher that hangs is killed with its ranks.
    """

    def run(program, *arguments, ranks=2, timeout=300, env=None):
        command = [
            *(sys.executable, "-m", "deepspeed.launcher.runner"),
            *("--num_gpus", str(ranks), "--master_port", str(free_port())),
            *(str(program), *map(str, arguments)),
        ]
        settings = {
            **os.environ,
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            **(env or {}),
        }
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env=settings, start_new_session=True, cwd=ROOT,
        )  # fmt: skip
        try:
            output, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
            pytest.fail(f"{program} hung:\n{output[-3000:]}")
        return subprocess.CompletedProcess(command, process.returncode, output)

    return run
