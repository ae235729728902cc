"""train.py whose rank 1 stops itself after step 2, under a watchdog with a limit of three seconds.

Only from that step on, so that a slow machine's start and first steps raise no false alarm.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
sys.path[0] = str(ROOT)


def main() -> None:
    from dsasr.launch.watchdog import Watchdog, WatchdogConfig
    from dsasr.training.trainer import Trainer

    save_if_due = Trainer.save_if_due

    def save_and_stop(run: Trainer) -> None:
        save_if_due(run)
        if run.steps == 2:
            dog = run.watchdog
            dog.close()
            rank, world_size, start = dog.rank, dog.world_size, dog.alarm.name
            run.watchdog = Watchdog(run.recipe.folder, WatchdogConfig(3), rank, world_size, start)
            run.watchdog.at(*dog._doing)  # what is being done, and with which samples
            if rank == 1:
                os.kill(os.getpid(), signal.SIGSTOP)

    Trainer.save_if_due = save_and_stop
    runpy.run_path(str(ROOT / "dsasr" / "train.py"), run_name="__main__")


if __name__ == "__main__":
    main()
