"""Show what a recipe will do before it is trained: stages, rates, encoder swaps, memory a rank.

example:
  dsasr timeline --recipe nim-2.3b --ranks 64 --plot timeline.png
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dsasr.cli.arguments import add_recipe, command_parser
from dsasr.utils.errors import UserError


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command_parser(__name__, __doc__)
    add_recipe(parser)
    parser.add_argument("--ranks", type=int, default=8, help="ranks that share the memory")
    parser.add_argument(
        "--triggers", type=int, nargs="*", default=None, metavar="STEP",
        help="pretrain steps at which CKA is assumed to fall below the threshold (default: 50.5%% "
        "and 66%% of pretraining, as in the paper's run)",
    )  # fmt: skip
    parser.add_argument("--plot", type=Path, help="write the timeline as a PNG")
    args = parser.parse_args(arguments)
    if args.plot and args.plot.suffix != ".png":
        raise UserError(f"--plot {args.plot}: give a name that ends in .png")

    from dsasr import recipe
    from dsasr.planning import timeline
    from dsasr.tracking.timeline_plot import planned_lr_curves, plot

    cfg = recipe.load(args.recipe, args.overrides)
    schedule = cfg.schedule()
    triggers = args.triggers
    if triggers is None:
        triggers = timeline.paper_drift_steps(schedule)
    events, accuracy = timeline.simulate_scaled(schedule, triggers)
    print(timeline.stage_table(cfg, args.ranks))
    print(timeline.swap_rule(schedule))
    if schedule.pretrain and cfg.branch == "both":
        p, s = cfg.interleave
        print(f"turns: {p} pretrain : {s} sft while both branches run")
    if triggers:
        steps = ", ".join(f"{t:,}" for t in triggers)
        print(f"\nassumed: CKA falls below the threshold at pretrain steps {steps} (--triggers)")
    print(timeline.format_events(events, accuracy))
    if args.plot:
        title = f"{args.recipe}: planned stages and encoder swaps"
        plot(events, args.plot, title, lrs=planned_lr_curves(schedule, events))
        print(f"picture: {args.plot}")
