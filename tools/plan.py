"""Plan a run before it is started: the size of its batches, their padding, a cluster's time.

python tools/plan.py batch --recipe demo --stage pretrain --memory 4
python tools/plan.py padding --recipe demo data.dataloader.batch.frames=3000
python tools/plan.py --recipe nim-2.3b --nodes 8 --gpus 8 --gpu-memory 80
"""

from __future__ import annotations

import argparse
import datetime
import sys

from dsasr import recipe
from dsasr.build import Builder
from dsasr.data.dataloader.bucketing import FRAMES_PER_SECOND
from dsasr.planning import batch_search, cluster_sizing
from dsasr.planning.memory import Machine, Traffic
from dsasr.planning.model_parts import count_parts
from dsasr.utils.errors import UserError, run_tool
from dsasr.utils.progress import Bar


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
    cluster = commands.add_parser(
        "cluster", help="memory of a GPU, time and traffic of a step, GPU-hours, from shapes alone"
    )
    cluster.set_defaults(run=plan_cluster)
    given = Machine()
    for name, value, text in (
        ("--gpu-memory", given.memory, "GB of a GPU"),
        ("--rate", given.rate, "TFLOP/s that a GPU sustains; 0: measured on this machine"),
        ("--inside", given.inside, "GB/s of a GPU inside a node"),
        ("--network", given.network, "GB/s of a GPU between nodes"),
        ("--storage", given.storage, "GB/s that all GPUs together read from the shards"),
        ("--utterance", Traffic().seconds, "seconds of an average utterance"),
        ("--tokens", Traffic().tokens, "transcript tokens a second"),
    ):
        cluster.add_argument(name, type=float, default=value, help=f"{text} ({value:g})")
    cluster.add_argument("--nodes", type=int, default=given.nodes)
    cluster.add_argument("--gpus", type=int, default=given.gpus, help="of a node")
    cluster.add_argument("--start", default="", help="the day it begins, as 2026-01-31; today")
    for command in (batch, padding, cluster):
        command.add_argument("--recipe", required=True, help="a packaged name, or a YAML file")
        command.add_argument("--stage", help="default: every stage in turn")
        command.add_argument("overrides", nargs="*", metavar="key=value")
    given = sys.argv[1:] if arguments is None else arguments
    if given and given[0].startswith("--") and given[0] != "--help":
        given = ["cluster", *given]  # the plan that most want
    return parser.parse_args(given)


def plan_batch(args: argparse.Namespace, chosen: recipe.Recipe) -> None:
    if args.memory < 0 or not 0 <= args.margin < 1 or args.most < batch_search.ROUND:
        raise UserError(f"give --memory ≥ 0, --margin in [0, 1) and --most ≥ {batch_search.ROUND}")
    Builder(chosen).check()
    for stage in stages(args, chosen):
        with Bar(desc=stage.name, unit="probe") as bar:

            def report(probe: batch_search.BudgetProbe, bar=bar) -> None:
                bar.set_postfix_str(f"{probe.frames} frames {'fit' if probe.fits else 'do not'}")
                bar.update()

            result = batch_search.search_budget(
                chosen, stage, memory=round(args.memory * batch_search.GIB), margin=args.margin,
                limit=args.most, report=report,
            )  # fmt: skip
        print(batch_search.search_table(result), end="\n\n")


def plan_padding(args: argparse.Namespace, chosen: recipe.Recipe) -> None:
    print(f"{'stage':<12} {'samples':>9} {'hours':>8} {'batches':>8} {'longest':>8} "
          f"{'filled':>7} {'padding':>8}  left out")  # fmt: skip
    for stage in stages(args, chosen):
        plan = batch_search.forecast_stage(chosen, stage, args.shards)
        causes = ", ".join(f"{cause} {n}" for cause, n in plan.left_out.most_common())
        print(f"{stage.name:<12} {plan.samples:>9} {plan.hours:>8.2f} {plan.batches:>8} "
              f"{plan.longest / FRAMES_PER_SECOND:>6.1f} s {plan.fill:>7.1%} {plan.padding:>8.2%}"
              f"  {causes or '-'}")  # fmt: skip


def plan_cluster(args: argparse.Namespace, chosen: recipe.Recipe) -> None:
    if (
        min(args.nodes, args.gpus) < 1
        or min(args.inside, args.network, args.storage, args.utterance) <= 0
    ):
        raise UserError("give at least one node and GPU, and rates above 0")
    machine = Machine(
        args.nodes, args.gpus, args.gpu_memory, args.rate or cluster_sizing.measure_rate(),
        args.inside, args.network, storage=args.storage,
    )  # fmt: skip
    traffic = Traffic(args.utterance, args.tokens)
    try:
        start = datetime.date.fromisoformat(args.start) if args.start else datetime.date.today()
    except ValueError:
        raise UserError(f"--start {args.start}: give a day as 2026-01-31") from None
    parts = count_parts(chosen)
    shown = ", ".join(f"{n} {p.parameters / 1e6:,.1f} M" for n, p in parts.items())
    print(f"parameters: {shown}")
    print(f"{machine.nodes} x {machine.gpus} GPUs of {machine.memory:g} GB at "
          f"{machine.rate:.3g} TFLOP/s\n")  # fmt: skip
    costs = [
        cluster_sizing.estimate_step(chosen, s, machine, traffic, parts)
        for s in stages(args, chosen)
    ]
    names = list(dict.fromkeys(name for cost in costs for name in cost.memory))
    print(f"{'GB of a GPU':<12} {'all':>7} " + " ".join(f"{n:>11}" for n in names))
    for cost in costs:
        cells = " ".join(f"{cost.memory.get(n, 0.0):>11.2f}" for n in names)
        print(f"{cost.stage:<12} {cost.peak:>7.1f} {cells}")
    print(f"\n{'stage':<12} {'steps':>10} {'s/step':>8} {'products':>9} {'network':>8} "
          f"{'GB sent':>8} {'h audio':>8} {'days':>7} {'GPU-hours':>10}  limited by")  # fmt: skip
    total = 0.0
    for cost in costs:
        hours = cost.steps * cost.seconds / 3600
        total += hours
        print(f"{cost.stage:<12} {cost.steps:>10,} {cost.seconds:>8.3f} {cost.compute:>9.3f} "
              f"{cost.network:>8.3f} {cost.traffic / 1e9:>8.1f} {cost.audio_hours:>8.2f} "
              f"{hours / 24:>7.1f} {hours * machine.world:>10,.0f}  {cost.bottleneck}")  # fmt: skip
    end = start + datetime.timedelta(hours=total)
    saved = cluster_sizing.checkpoint_bytes(chosen, parts) / 1e9
    whole = f"{total / 24:,.1f} days, {total * machine.world:,.0f} GPU-hours"
    print(f"\nfrom {start} to {end}: {whole}; a checkpoint is {saved:.1f} GB")
    longest = max(costs, key=lambda cost: cost.steps * cost.seconds).stage
    stage = chosen.stage(longest)
    print(f"\nstage {longest} by size\n{'GPUs':>5} {'GB':>6} {'s/step':>8} {'h audio/step':>13} "
          f"{'h audio/GPU-h':>14}  {'limited by':<10}  change")  # fmt: skip
    for size in cluster_sizing.machine_sizes(machine):
        cost = cluster_sizing.estimate_step(chosen, stage, size, traffic, parts)
        speed = cost.audio_hours / (cost.seconds * size.world / 3600)
        print(f"{size.world:>5} {cost.peak:>6.1f} {cost.seconds:>8.3f} {cost.audio_hours:>13.1f} "
              f"{speed:>14,.0f}  {cost.bottleneck:<10}  "
              f"{cluster_sizing.advice(cost, size, chosen)}")  # fmt: skip


def stages(args: argparse.Namespace, chosen: recipe.Recipe) -> list:
    return [chosen.stage(args.stage)] if args.stage else list(chosen.stages)


def main() -> None:
    args = parse()
    args.run(args, recipe.load(args.recipe, args.overrides))


if __name__ == "__main__":
    sys.exit(run_tool(main))
