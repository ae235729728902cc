"""Submit a recipe to Slurm: print the plan, and the command, and run it.

python tools/submit.py train --recipe nim-2.3b run=/shared/nim slurm.size.nodes=8 --dry-run
python tools/submit.py async --recipe nim-2.3b run=/shared/nim slurm.sft.nodes=4
python tools/submit.py eval --recipe nim-2.3b run=/shared/nim --data clean=/data/test-clean
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from dsasr import config, recipe
from dsasr.build import Builder
from dsasr.launch import slurm
from dsasr.utils.errors import UserError, run_tool
from dsasr.utils.io import atomic_write

ROOT = Path(__file__).parent.parent


def schedule_rows(chosen: recipe.Recipe, asynchronous: bool) -> list[tuple[str, str]]:
    """What each stage costs, per optimizer step, on this size."""
    rows = []
    for stage in chosen.stages:
        sft = asynchronous and stage.branch == "sft"
        world = (chosen.slurm.sft if sft else chosen.slurm.size).world_size
        batch = stage.batch or chosen.data.dataloader.batch
        audio = world * stage.grad_accum_steps * batch.frames / 100 / 3600
        trained = "+".join(stage.trains)
        rows.append((stage.name, f"{stage.steps:,} steps, {trained}, ≤ {audio:.2f} h audio a step"))
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("job", choices=("train", "async", "eval"))
    parser.add_argument("--recipe", required=True, help="a packaged recipe's name, or a YAML file")
    parser.add_argument("--data", nargs="+", default=[], metavar="NAME=SHARDS", help="eval: sets")
    parser.add_argument("--python", default=sys.executable, help="interpreter on the nodes")
    parser.add_argument("--no-check", action="store_true", help="the data is not visible from here")
    parser.add_argument("--dry-run", action="store_true", help="print, submit nothing")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="recipe overrides")
    args = parser.parse_intermixed_args()
    chosen = recipe.load(args.recipe, args.overrides)
    run = Path(chosen.run).absolute()
    if args.job == "eval":
        if not args.data:
            raise UserError("eval needs --data NAME=SHARDS …")
        made = slurm.evaluate(chosen.slurm, run, args.python, args.data)
    else:
        if chosen.branch != "both":
            raise UserError("give no branch=…: train runs both in turns, async side by side")
        make = slurm.train if args.job == "train" else slurm.concurrent
        made = make(chosen.slurm, run, args.python)
        if not args.no_check:
            Builder(chosen).check()
    rows = [*made.plan]
    if args.job != "eval":
        rows += schedule_rows(chosen, args.job == "async")
    for name, value in rows:
        print(f"{name:>12}  {value}")
    given = dict(made.variables)
    if args.job != "eval":
        given["RECIPE"] = str(run / "submitted.yaml")
    shown = " ".join(f"{k}={shlex.quote(v)}" for k, v in given.items())
    print(f"\n{shown} \\\n  {shlex.join(made.command)}")
    if args.dry_run:
        return 0
    if shutil.which("sbatch") is None:
        raise UserError("there is no sbatch here: submit from a login node, or give --dry-run")
    (run / "logs").mkdir(parents=True, exist_ok=True)
    if args.job != "eval":
        atomic_write(run / "submitted.yaml", config.dump(chosen))
    return subprocess.run(made.command, env={**os.environ, **given}, cwd=ROOT).returncode


if __name__ == "__main__":
    sys.exit(run_tool(main))
