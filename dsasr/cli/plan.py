"""Plan a run before it is started: the size of its batches, their padding, a cluster's time.

examples:
  dsasr plan cluster --recipe nim-2.3b --nodes 8 --gpus 8 --gpu-memory 80
  dsasr plan batch --recipe demo --stage pretrain --memory 4
  dsasr plan padding --recipe demo data.dataloader.batch.frames=3000
"""

from __future__ import annotations

import argparse
import datetime
import sys
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from dsasr.cli.arguments import add_recipe, command_parser
from dsasr.utils.errors import UserError

if TYPE_CHECKING:
    from dsasr.planning.batch_search import BudgetProbe
    from dsasr.recipe import Recipe
    from dsasr.stages import StageConfig


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    from dsasr.planning.memory import Machine, Traffic

    parser = command_parser(__name__, __doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    cluster = commands.add_parser(
        "cluster", help="memory of a GPU, time and traffic of a step, GPU-hours, from shapes alone"
    )
    cluster.set_defaults(run=plan_cluster)
    default = Machine()
    for name, value, text in (
        ("--gpu-memory", default.memory, "GB of a GPU"),
        ("--rate", default.rate, "TFLOP/s that a GPU sustains; 0: measured on this machine"),
        ("--inside", default.inside, "GB/s of a GPU inside a node"),
        ("--network", default.network, "GB/s of a GPU between nodes"),
        ("--storage", default.storage, "GB/s that all GPUs together read from the shards"),
        ("--utterance", Traffic().seconds, "seconds of an average utterance"),
        ("--tokens", Traffic().tokens, "transcript tokens a second"),
    ):
        cluster.add_argument(name, type=float, default=value, help=f"{text} ({value:g})")
    cluster.add_argument("--nodes", type=int, default=default.nodes)
    cluster.add_argument("--gpus", type=int, default=default.gpus, help="of a node")
    cluster.add_argument("--start", default="", help="the day it begins, as 2026-01-31; today")
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
    for command in (cluster, batch, padding):
        add_recipe(command)
        command.add_argument("--stage", help="default: every stage in turn")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)

    from dsasr import recipe

    cfg = recipe.load(args.recipe, args.overrides)
    stages = [cfg.stage(args.stage)] if args.stage else list(cfg.stages)
    args.run(args, cfg, stages)


def plan_cluster(args: argparse.Namespace, cfg: Recipe, stages: Sequence[StageConfig]) -> None:
    from dsasr.planning.cluster_table import cluster_plan
    from dsasr.planning.measure_rate import measure_rate
    from dsasr.planning.memory import Machine, Traffic

    if (
        min(args.nodes, args.gpus) < 1
        or min(args.inside, args.network, args.storage, args.utterance) <= 0
    ):
        raise UserError("give at least one node and GPU, and rates above 0")
    machine = Machine(
        args.nodes, args.gpus, args.gpu_memory, args.rate or measure_rate(), args.inside,
        args.network, storage=args.storage,
    )  # fmt: skip
    try:
        start = datetime.date.fromisoformat(args.start) if args.start else datetime.date.today()
    except ValueError:
        raise UserError(f"--start {args.start}: give a day as 2026-01-31") from None
    traffic = Traffic(args.utterance, args.tokens)
    for line in cluster_plan(cfg, stages, machine, traffic, start):
        print(line)


def plan_batch(args: argparse.Namespace, cfg: Recipe, stages: Sequence[StageConfig]) -> None:
    from dsasr.build import Builder
    from dsasr.planning import batch_search
    from dsasr.training import preflight

    if args.memory < 0 or not 0 <= args.margin < 1 or args.most < batch_search.ROUND:
        raise UserError(f"give --memory ≥ 0, --margin in [0, 1) and --most ≥ {batch_search.ROUND}")
    preflight.check(Builder(cfg))
    for stage in stages:
        say(
            f"{stage.name}: the model is built in a process of its own: a minute, or some, on a CPU"
        )
        result = batch_search.search_budget(
            cfg, stage, memory=round(args.memory * batch_search.GIB), margin=args.margin,
            limit=args.most, begin=partial(say_begin, stage.name),
            report=partial(say_probe, stage.name),
        )  # fmt: skip
        print(batch_search.search_table(result), end="\n\n")


def say(line: str) -> None:
    """Print what is going on, apart from the result."""
    print(line, file=sys.stderr, flush=True)


def say_begin(stage: str, frames: int) -> None:
    say(f"{stage}: trying {frames:,} frames …")


def say_probe(stage: str, probe: BudgetProbe) -> None:
    peak = (
        ""
        if probe.peak is None
        else f": {probe.peak / 2**30:.2f} GiB, {probe.seconds:.1f} s a step"
    )
    verdict = f"fit{peak}" if probe.fits else f"do not fit ({probe.reason}){peak}"
    say(f"{stage}: {probe.frames:,} frames {verdict}")


def plan_padding(args: argparse.Namespace, cfg: Recipe, stages: Sequence[StageConfig]) -> None:
    from dsasr.data.dataloader.bucketing import FRAMES_PER_SECOND
    from dsasr.planning import batch_search

    print(f"{'stage':<12} {'samples':>9} {'hours':>8} {'batches':>8} {'longest':>8} "
          f"{'filled':>7} {'padding':>8}  left out")  # fmt: skip
    for stage in stages:
        forecast = batch_search.forecast_stage(cfg, stage, args.shards)
        causes = ", ".join(f"{cause} {n}" for cause, n in forecast.left_out.most_common())
        longest = forecast.longest / FRAMES_PER_SECOND
        print(f"{stage.name:<12} {forecast.samples:>9} {forecast.hours:>8.2f} "
              f"{forecast.batches:>8} {longest:>6.1f} s {forecast.fill:>7.1%} "
              f"{forecast.padding:>8.2%}  {causes or '-'}")  # fmt: skip
