"""Plan a run before it is started: how large its batches may be, and how much of them is padding.

python tools/plan.py batch --recipe demo --stage pretrain --memory 4
python tools/plan.py padding --recipe demo data.stream.batch.frames=3000
"""

from __future__ import annotations

import argparse
import sys

from tqdm import tqdm

from dsasr import budget, recipe
from dsasr.data.plan import FRAMES_PER_SECOND
from dsasr.errors import UserError, run_tool


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    batch = commands.add_parser(
        "batch", help="the largest frame and token budget that fits the memory, by trying"
    )
    batch.set_defaults(run=plan_batch)
    batch.add_argument(
        "--memory", type=float, default=0.0, metavar="GIB",
        help="that one rank may use; default: what the GPU or the machine has free",
    )  # fmt: skip
    batch.add_argument("--margin", type=float, default=0.05, help="share to leave free (0.05)")
    batch.add_argument(
        "--most", type=int, default=200_000, metavar="FRAMES", help="end the search here (200000)"
    )
    padding = commands.add_parser(
        "padding", help="an epoch's batches, their padding and what is left out, from the indexes"
    )
    padding.set_defaults(run=plan_padding)
    padding.add_argument(
        "--shards", type=int, default=0, help="of each dataset, evenly chosen; 0: all"
    )
    for command in (batch, padding):
        command.add_argument("--recipe", required=True, help="a packaged name, or a YAML file")
        command.add_argument("--stage", help="default: every stage in turn")
        command.add_argument("overrides", nargs="*", metavar="key=value")
    return parser.parse_args(arguments)


def plan_batch(args: argparse.Namespace, chosen: recipe.Recipe) -> None:
    if args.memory < 0 or not 0 <= args.margin < 1 or args.most < budget.ROUND:
        raise UserError(f"give --memory ≥ 0, --margin in [0, 1) and --most ≥ {budget.ROUND}")
    budget.check(chosen)
    for stage in stages(args, chosen):
        with tqdm(desc=stage.name, unit="trial", file=sys.stderr) as bar:

            def tell(trial: budget.Trial, bar=bar) -> None:
                bar.set_postfix_str(f"{trial.frames} frames {'fit' if trial.fits else 'do not'}")
                bar.update()

            found = budget.probe(
                chosen, stage, memory=round(args.memory * budget.GIB), margin=args.margin,
                most=args.most, tell=tell,
            )  # fmt: skip
        print(budget.table(found), end="\n\n")


def plan_padding(args: argparse.Namespace, chosen: recipe.Recipe) -> None:
    print(f"{'stage':<12} {'samples':>9} {'hours':>8} {'batches':>8} {'longest':>8} "
          f"{'filled':>7} {'padding':>8}  left out")  # fmt: skip
    for stage in stages(args, chosen):
        told = budget.outlook(chosen, stage, args.shards)
        causes = ", ".join(f"{cause} {n}" for cause, n in told.left_out.most_common())
        print(f"{stage.name:<12} {told.samples:>9} {told.hours:>8.2f} {told.batches:>8} "
              f"{told.longest / FRAMES_PER_SECOND:>6.1f} s {told.fill:>7.1%} {told.padding:>8.2%}"
              f"  {causes or '-'}")  # fmt: skip


def stages(args: argparse.Namespace, chosen: recipe.Recipe) -> list:
    return [budget.stage_of(chosen, args.stage)] if args.stage else list(chosen.stages)


def main() -> None:
    args = parse()
    args.run(args, recipe.load(args.recipe, args.overrides))


if __name__ == "__main__":
    sys.exit(run_tool(main))
