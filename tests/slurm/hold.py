"""train.py that waits after a given step until it is killed or signaled.

A drill that kills a job "at step 16" cannot miss its moment so, however fast or slow the machine.
``HOLD="5 16"``: the job's first start waits after step 5, the second after step 16, later ones
never. Each rank that waits says so in ``RUN/held-START-RANK.json``: its pid and its node.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
import time
from pathlib import Path


def main() -> None:
    train = Path(sys.argv[1])
    sys.argv = sys.argv[1:]
    sys.path[0] = str(train.parent.parent)  # the run's own copy of the code
    steps = [int(word) for word in os.environ["HOLD"].split()]
    start = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    if start < len(steps):
        hold(steps[start], start)
    runpy.run_path(str(train), run_name="__main__")


def hold(step: int, start: int) -> None:
    from dsasr.training.trainer import Trainer
    from dsasr.utils.io import atomic_write

    save_if_due = Trainer.save_if_due

    def wait(run: Trainer) -> None:
        save_if_due(run)
        if run.steps != step:
            return
        here = {"pid": os.getpid(), "node": os.environ["SLURMD_NODENAME"]}
        name = f"held-{start}-{os.environ['RANK']}.json"
        atomic_write(run.recipe.folder / name, json.dumps(here))
        while not run.request.cause:
            time.sleep(0.05)
        run.stop_if_asked()

    Trainer.save_if_due = wait


if __name__ == "__main__":
    main()
