"""The buffers in /dev/shm through which DeepSpeed's ranks on a CPU add up: 66 MiB a rank.

DeepSpeed 0.19 leaves their names there. Without a name the memory lives as long as a process has it
mapped, so that nothing is left of a job, however it ends.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from dsasr.utils import distributed

FOLDER = Path("/dev/shm")


def _name(rank: int | str) -> str:
    job = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    return f"deepspeed_allreduce_buffer_{os.getuid()}_{'_'.join(job)}_{rank}"


def unlink_own() -> None:
    """Remove the name of this rank's buffer, once all ranks have mapped it; collective."""
    distributed.barrier()
    _unlink(FOLDER / _name(distributed.rank()))


def unlink_left() -> None:
    """Remove this user's buffers that no process has open: of jobs that were killed while they
    started.

    Those with this job's port are spared: another rank may be about to use them.
    """
    buffers = FOLDER.glob(f"deepspeed_allreduce_buffer_{os.getuid()}_*")
    left = {str(path) for path in buffers if not path.match(_name("*"))}
    for path in left - _open_files() if left else ():
        _unlink(Path(path))


def _open_files() -> set[str]:
    """Files that processes of this machine have open, of those that this user may see."""
    files = set()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # another user's, or it has ended
            for handle in (process / "fd").iterdir():
                with contextlib.suppress(OSError):
                    files.add(os.readlink(handle))
    return files


def _unlink(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)
