"""The buffers in /dev/shm through which DeepSpeed's ranks on a CPU add up: 66 MiB a rank.

DeepSpeed 0.19 leaves their names there. Without a name the memory lives as long as a process has it
mapped, so that nothing is left of a job, however it ends.
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

from dsasr.utils import distributed

FOLDER = Path("/dev/shm")
SETTLED = 600.0  # seconds after which all ranks of a job have mapped each other's buffers


def _name(rank: int | str) -> str:
    job = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    return f"deepspeed_allreduce_buffer_{os.getuid()}_{'_'.join(job)}_{rank}"


def unlink_own() -> None:
    """Remove the name of this rank's buffer, once all ranks have mapped it; collective."""
    distributed.barrier()
    _unlink(FOLDER / _name(distributed.rank()))


def unlink_left() -> None:
    """Remove this user's buffers of jobs that were killed while they started.

    A job that still runs keeps what it has mapped. One with this job's port is spared: a rank may
    have mapped it just now.
    """
    for path in FOLDER.glob(f"deepspeed_allreduce_buffer_{os.getuid()}_*"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > SETTLED and not path.match(_name("*")):
                _unlink(path)


def _unlink(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)
