"""Submit a recipe to Slurm: print the plan and the command, and run it.

train: both branches take turns in one job; async: a component of the job for each branch; eval: an
array of jobs, one a test set. The recipe's slurm.… keys give sizes, times and accounts.

examples:
  dsasr submit train --recipe nim-2.3b run=/shared/nim slurm.size.nodes=8 --dry-run
  dsasr submit async --recipe nim-2.3b run=/shared/nim slurm.sft.nodes=4
  dsasr submit eval --recipe nim-2.3b run=/shared/nim --data clean=/data/test-clean
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dsasr.cli.arguments import add_recipe, command_parser
from dsasr.utils.errors import UserError
from dsasr.utils.io import atomic_write
from dsasr.utils.masking import MASK, mask

if TYPE_CHECKING:
    from dsasr.recipe import Recipe


def main(arguments: Sequence[str] | None = None) -> int:
    parser = command_parser(__name__, __doc__)
    parser.add_argument("job", choices=("train", "async", "eval"))
    add_recipe(parser)
    parser.add_argument("--data", nargs="+", default=[], metavar="NAME=SHARDS", help="eval: sets")
    parser.add_argument("--python", default=sys.executable, help="interpreter on the nodes")
    parser.add_argument("--no-check", action="store_true", help="the data is not visible from here")
    parser.add_argument("--dry-run", action="store_true", help="print, submit nothing")
    args = parser.parse_intermixed_args(arguments)

    from dsasr import config, recipe
    from dsasr.build import Builder
    from dsasr.launch import slurm
    from dsasr.training import preflight

    cfg = recipe.load(args.recipe, args.overrides)
    _refuse_credentials([config.dump(cfg), *args.data], [*args.overrides, *args.data])
    run = Path(cfg.run).absolute()
    if args.job == "eval":
        if not args.data:
            raise UserError("eval needs --data NAME=SHARDS …")
        job = slurm.evaluate(cfg.slurm, run, args.python, args.data)
        rows, variables = job.plan, job.variables
    else:
        if cfg.branch != "both":
            raise UserError("give no branch=…: train runs both in turns, async side by side")
        build = slurm.train if args.job == "train" else slurm.concurrent
        job = build(cfg.slurm, run, args.python)
        if not args.no_check:
            preflight.check(Builder(cfg))
        rows = (*job.plan, *schedule_rows(cfg, args.job == "async"))
        variables = {**job.variables, "RECIPE": str(run / "submitted.yaml")}
    for name, value in rows:
        print(f"{name:>12}  {value}")
    assignments = " ".join(f"{k}={shlex.quote(v)}" for k, v in variables.items())
    print(f"\n{assignments} \\\n  {shlex.join(job.command)}")
    if args.dry_run:
        return 0
    if shutil.which("sbatch") is None:
        raise UserError("there is no sbatch here: submit from a login node, or give --dry-run")
    (run / "logs").mkdir(parents=True, exist_ok=True)
    if args.job != "eval":
        atomic_write(run / "submitted.yaml", config.dump(cfg))
    return subprocess.run(job.command, env={**os.environ, **variables}).returncode


def _refuse_credentials(stored: Sequence[str], given: Sequence[str]) -> None:
    """Raise `UserError` for a credential in a URL: the job would read what is stored without it."""
    if any(MASK in text for text in stored) or any(mask(text) != text for text in given):
        raise UserError(
            "the recipe or --data holds a password or signature in a URL, which no file of a run "
            "stores: give it as ${NAME}, of an environment variable NAME or the file of NAME_FILE"
        )


def schedule_rows(recipe: Recipe, asynchronous: bool) -> list[tuple[str, str]]:
    """What each stage costs, per optimizer step, on this size."""
    rows = []
    for stage in recipe.stages:
        sft = asynchronous and stage.branch == "sft"
        world_size = (recipe.slurm.sft if sft else recipe.slurm.size).world_size
        batch = stage.batch or recipe.data.dataloader.batch
        audio = world_size * stage.grad_accum_steps * batch.frames / 100 / 3600
        trained = "+".join(stage.trains)
        rows.append((stage.name, f"{stage.steps:,} steps, {trained}, ≤ {audio:.2f} h audio a step"))
    return rows
