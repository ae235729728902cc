"""Train a recognizer: ``deepspeed dsasr/train.py --recipe demo key=value …``.

One rank works without the launcher: ``python dsasr/train.py --recipe demo``.
"""

import os
import sys

if __name__ == "__main__":
    # Run as a script, this folder stands first on the path, where transformers' optional
    # ``import kernels`` would find ours.
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [p for p in sys.path if os.path.abspath(p or os.getcwd()) != here]
    sys.path.insert(0, os.path.dirname(here))

import argparse
import signal
import time

from dsasr.launch.orphan_ranks import end_with_launcher
from dsasr.utils.errors import UserError, run_tool

PATIENCE = 5.0  # seconds in which rank 0 tells a mistake and is gone


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", required=True, help="a packaged recipe's name, or a YAML file")
    parser.add_argument("--local_rank", type=int, default=0, help="set by the deepspeed launcher")
    parser.add_argument("--check", action="store_true", help="check the recipe and its files, stop")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="recipe overrides")
    return parser.parse_args(arguments)


def train(run) -> None:
    """The loop. One turn is one optimizer step of one branch."""
    while (turn := run.turn()).kind != "end":
        if turn.kind == "wait":
            run.wait()
            continue
        branch = run.enter(turn.stage)  # no-op unless the stage or the branch changed
        if turn.load is not None and not run.swap(branch, turn.load):
            continue  # refused: the log says why
        report = branch.step(run.batches(turn.stage), turn.step)
        run.advance(turn)
        if branch.name == "pretrain":
            cause, found = run.drift_cause()
            if cause is not None:
                run.publish(cause, found)
        run.write(report)
        run.evaluate_if_due(branch, report)
        run.save_if_due()
    run.finish()


def main() -> int:
    options = parse()
    os.environ.setdefault("LOCAL_RANK", str(options.local_rank))
    end_with_launcher()
    from dsasr import build, recipe
    from dsasr.engine import branch_engine
    from dsasr.kernels import dispatch
    from dsasr.launch import watchdog
    from dsasr.training.trainer import Stopped, Trainer
    from dsasr.utils import distributed

    recipe.quiet()
    chosen = recipe.load(options.recipe, options.overrides)
    branch_engine.set_threads(chosen.engine)
    dispatch.select(chosen.kernels)
    branch_engine.check_nvme(chosen.engine)
    build.Builder(chosen).check()
    if options.check:
        print("the recipe and its files are in order")
        return 0
    dog = watchdog.for_rank(chosen.folder, chosen.watchdog)
    dog.at("start")
    # The watchdog speaks first: it knows more.
    limits = chosen.watchdog.seconds, chosen.watchdog.start_seconds
    run = None
    try:
        branch_engine.init_distributed(max(limits) + 120 if all(limits) else 0)
        run = Trainer(chosen, dog)
        train(run)
    except Stopped:
        return 0
    finally:
        if run is not None:
            run.close()
        dog.close()
        distributed.destroy_process_group()
    return 0


def main_once() -> int:
    """`main`, with a user's mistake told by one rank instead of by all.

    The end of the first rank that ends is everyone's, by the launcher or by Slurm: rank 0 is to
    speak before. A mistake that rank 0 has no part in is told by the ranks that it stops.
    """
    try:
        return main()
    except UserError:
        if os.environ.get("RANK", "0") != "0":
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a run takes it for a wish to stop
            time.sleep(PATIENCE)
        raise


if __name__ == "__main__":
    code = run_tool(main_once)
    from dsasr.utils import distributed

    distributed.end_process(code)
