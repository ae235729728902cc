"""Submit a recipe to Slurm: print the plan and the command, and run it.

train: both branches take turns in one job; async: a component of the job for each branch; eval: an
array of jobs, one a test set. The recipe's slurm.… keys give sizes, times and accounts. --dry-run
prints the same, and below it what is still missing.

examples:
  dsasr submit train --recipe nim-2.3b run=/shared/nim slurm.size.nodes=8 --dry-run
  dsasr submit async --recipe nim-2.3b run=/shared/nim slurm.sft.nodes=4
  dsasr submit eval --recipe nim-2.3b run=/shared/nim --data clean=/data/test-clean
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from dsasr.cli.arguments import add_recipe, command_parser
from dsasr.utils.errors import UserError
from dsasr.utils.io import atomic_write
from dsasr.utils.masking import MASK, mask

if TYPE_CHECKING:
    from dsasr.build import Builder
    from dsasr.data.dataloader.dataloader import DatasetConfig
    from dsasr.recipe import Recipe

STORED = "submitted.yaml"  # in a run folder: the recipe that its job reads


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
    from dsasr.launch import slurm

    cfg = recipe.load(args.recipe, args.overrides)
    _refuse_credentials([config.dump(cfg), *args.data], [*args.overrides, *args.data])
    run, stored, missing = Path(cfg.run).absolute(), "", []
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
        stored = config.dump(cfg)
        missing = _obstacles(cfg, args.job == "async", args.no_check, every=args.dry_run)
        rows = (*job.plan, *schedule_rows(cfg, args.job == "async"))
        variables = {**job.variables, "RECIPE": str(run / STORED)}
    if missing and not args.dry_run:
        raise UserError(missing[0])
    for name, value in rows:
        print(f"{name:>12}  {value}")
    assignments = " ".join(f"{k}={shlex.quote(v)}" for k, v in variables.items())
    print(f"\n{assignments} \\\n  {shlex.join(job.command)}")
    if args.dry_run:
        if missing:
            print("\nbefore it can be submitted:")
            print(*(f"  {line}" for line in missing), sep="\n")
        return 0
    if shutil.which("sbatch") is None:
        raise UserError("there is no sbatch here: submit from a login node, or give --dry-run")
    return _submit(job.command, {**os.environ, **variables}, run, stored)


def _submit(command: Sequence[str], env: Mapping[str, str], run: Path, stored: str) -> int:
    """Run sbatch and return its exit code; the folder ``run`` is as before where it fails.

    ``stored``: the recipe's text, which the job reads; empty: none.
    """
    path, logs = run / STORED, run / "logs"
    before = path.read_bytes() if path.is_file() else None  # of a job that may be waiting
    made = [folder for folder in (logs, run, *run.parents) if not folder.exists()]
    logs.mkdir(parents=True, exist_ok=True)
    if stored:
        atomic_write(path, stored)
    code = subprocess.run(command, env=env).returncode
    if code:
        if before is not None:
            atomic_write(path, before)
        elif stored:
            path.unlink(missing_ok=True)
        for folder in made:
            with contextlib.suppress(OSError):  # something has been put there meanwhile
                folder.rmdir()
    return code


def _obstacles(cfg: Recipe, asynchronous: bool, no_check: bool, every: bool) -> list[str]:
    """What a training job would end at, a line each; ``every``: not the first alone."""
    from dsasr.build import Builder
    from dsasr.training import preflight

    looks: list[Callable[[], object]] = []
    if not no_check:
        builder = Builder(cfg)
        looks = [*(_parts(builder) if every else []), lambda: preflight.check(builder)]
    looks.append(lambda: _check_unfinished(cfg, asynchronous))
    found: list[str] = []
    for look in looks:
        try:
            look()
        except UserError as error:
            if str(error) not in found:
                found.append(str(error))
            if not every:
                break
    return found


def _parts(builder: Builder) -> Iterator[Callable[[], object]]:
    """Calls that raise `UserError` where a file of the recipe is not there, a part each; the check
    before a training ends at the first."""
    from dsasr.data.shards.storage import ShardReadError, ShardStorage

    cfg = builder.recipe
    if cfg.pretrained_encoder is None:
        yield lambda: builder.cmvn
    else:
        yield lambda: builder.encoder_folder
    if "pretrain" in cfg.branches or cfg.model.adaptor.reads_ctc:
        yield lambda: builder.phonemes
    if "sft" in cfg.branches:
        yield lambda: builder.llm_folder
    storage = ShardStorage(cfg.data.dataloader.source)

    def shards(key: str, data: DatasetConfig) -> None:
        try:
            storage.resolve(data.shards)
        except (UserError, ShardReadError) as error:
            raise UserError(f"{key}.{data.name}.shards: {error}") from None

    for key, datasets in (("data.train", cfg.data.train), ("data.valid", cfg.data.valid)):
        for data in datasets:
            yield partial(shards, key, data)


def _check_unfinished(cfg: Recipe, asynchronous: bool) -> None:
    """Raise `UserError` where all jobs of the run have trained all their steps."""
    branches = ("pretrain", "sft") if asynchronous else ("both",)
    if not all(_is_finished(replace(cfg, branch=branch)) for branch in branches):
        return
    last = cfg.stages[-1]
    raise UserError(
        f"run={cfg.run} is finished: give another run=FOLDER for a new training, or more steps to "
        f"go on with this one: stages.{last.name}.steps={2 * last.steps} allow_changed=true"
    )


def _is_finished(cfg: Recipe) -> bool:
    """Whether the newest checkpoint that a job of ``cfg`` would resume from is that of its end."""
    from dsasr.checkpoint.locate import list_checkpoints
    from dsasr.checkpoint.manifest import read_manifest
    from dsasr.checkpoint.tensor_fragments import FragmentError
    from dsasr.training.stage_position import progress_in

    checkpoints = list_checkpoints(cfg.folder / "checkpoints")
    if cfg.resume != "auto" or not checkpoints:
        return False
    try:
        manifest = read_manifest(checkpoints[-1])
    except FragmentError:  # an older one is tried
        return False
    if not manifest.get("finished"):
        return False
    schedule = cfg.schedule()
    return schedule.next_turn(progress_in(manifest, schedule)).kind == "end"


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
