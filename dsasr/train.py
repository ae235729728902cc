"""Train a recognizer: one rank, as ``dsasr train`` starts it.

``deepspeed dsasr/train.py --recipe demo key=value …`` starts the same ranks with DeepSpeed's own
output; ``python dsasr/train.py --recipe demo`` trains on one rank without a launcher.
"""

from __future__ import annotations

import os
import sys

if __name__ == "__main__":
    # A script's own folder is first on the path: transformers' optional ``import kernels`` would
    # find the package's kernels there.
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [p for p in sys.path if os.path.abspath(p or os.getcwd()) != here]
    sys.path.insert(0, os.path.dirname(here))

import argparse
import gc
import signal
import time
from typing import TYPE_CHECKING

from dsasr.launch.orphan_ranks import end_with_launcher
from dsasr.launch.stop_request import EARLY, StopRequest
from dsasr.utils.errors import Failure, UserError, first_line, run_tool
from dsasr.utils.troubleshooting import see

if TYPE_CHECKING:
    from dsasr.build import Builder
    from dsasr.training.trainer import Trainer

RANK_0_SECONDS = 5.0  # that other ranks wait before they print an error which rank 0 prints, too
# What gloo, NCCL and the store of the process group say when another rank's process has ended.
LOST_RANK = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Connection was likely closed",
    "remote process exited",
)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", required=True, help="a packaged recipe's name, or a YAML file")
    parser.add_argument("--local_rank", type=int, default=0, help="set by the deepspeed launcher")
    parser.add_argument("--check", action="store_true", help="examine the data and the plan, stop")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="recipe overrides")
    return parser.parse_args(arguments)


def train(trainer: Trainer) -> None:
    """The training loop. A turn is one optimizer step of one branch."""
    trainer.finish_evaluation()  # if the process before this one ended in it
    while (turn := trainer.next_turn()).kind != "end":
        if turn.kind == "wait":
            trainer.wait_for_encoder()
            continue
        engine = trainer.enter(turn.stage)  # no-op unless the stage or the branch changes
        if turn.load is not None and not trainer.swap_encoder(engine, turn.load):
            continue  # the snapshot was refused, and an event says why
        report = engine.step(trainer.next_batches(turn.stage), turn.step, trainer.histograms_every)
        trainer.advance(turn)
        if engine.name == "pretrain":
            cause, cka = trainer.check_drift()  # the same on all ranks
            if cause is not None:
                trainer.publish_encoder(cause, cka)
        trainer.log(report)
        trainer.evaluate_if_due(engine, report)
        trainer.save_if_due()
    trainer.finish()


def main(arguments: list[str] | None = None) -> int:
    """Check the recipe and its files, then train one rank (``--check``: stop there).

    Returns the exit code; raises `UserError` for a mistake in the recipe or its files.
    """
    request = StopRequest()
    request.listen(*EARLY)
    options = parse(arguments)
    os.environ.setdefault("LOCAL_RANK", str(options.local_rank))
    end_with_launcher(request)
    from dsasr import build, recipe
    from dsasr.engine import process_setup
    from dsasr.engine.config import check_nvme
    from dsasr.kernels import dispatch
    from dsasr.training import first_samples, initial_weights, preflight
    from dsasr.utils.library_warnings import silence_library_warnings

    silence_library_warnings()
    cfg = recipe.load(options.recipe, options.overrides)
    process_setup.set_threads(cfg.engine)
    dispatch.select(cfg.kernels)
    check_nvme(cfg.engine)
    builder = build.Builder(cfg)
    preflight.check(builder)
    first_samples.check(builder)
    if options.check:
        initial_weights.check(builder)
        check_data_and_plan(builder)
        return 0
    with request.guard_output():
        return train_rank(builder, request)


def check_data_and_plan(builder: Builder) -> None:
    """``--check``: print the run's data, plan and warnings on one screen.

    Raises `UserError` where the run would fail.
    """
    from dsasr.planning import outlook
    from dsasr.training import preflight, sample_survey, survey_text

    print(f"{preflight.headline(builder)}\n", flush=True)
    surveys = sample_survey.survey(builder)
    hours = survey_text.hours_of_mixtures(builder, surveys)
    plan = outlook.outlook(builder.recipe, sample_survey.utterance(surveys), hours)
    warnings = [*preflight.warnings(builder)]
    warnings += [*survey_text.warnings(builder, surveys), *outlook.warnings(plan)]
    faults = [*survey_text.faults(surveys), *outlook.faults(plan)]
    for part in (survey_text.lines(builder, surveys), preflight.prompt_lines(builder),
                 preflight.llm_lines(builder), outlook.lines(plan)):  # fmt: skip
        if part:
            print("\n".join([*part, ""]))
    for line in warnings:
        print(f"WARNING {line}")
    if faults:
        raise UserError("; ".join(faults))
    but = f", but for {len(warnings)} warnings" if len(warnings) > 1 else ", but for a warning"
    print(f"the recipe and its files are in order{but if warnings else ''}")


def train_rank(builder: Builder, request: StopRequest) -> int:
    """Join the other ranks and train, until the end or a request to stop; returns the exit code."""
    from dsasr.engine import process_setup
    from dsasr.launch import rendezvous, run_lock, watchdog
    from dsasr.training.trainer import Stopped, Trainer
    from dsasr.utils import distributed

    cfg = builder.recipe
    rank_watchdog = watchdog.for_rank(cfg.folder, cfg.watchdog)
    rank_watchdog.at("start")
    # The watchdog ends a hang before the process group's timeout does: its message says more.
    limits = cfg.watchdog.seconds, cfg.watchdog.start_seconds
    trainer = lock = None
    try:
        rendezvous.check_master()
        process_setup.init_distributed(max(limits) + 120 if all(limits) else 0)
        lock = run_lock.hold(cfg.folder, request)
        gc.freeze()  # imports live as long as the process: the collector need not visit them
        trainer = Trainer(cfg, rank_watchdog, request, builder)
        request.begin_training()
        train(trainer)
    except Stopped:
        return 0
    finally:
        if trainer is not None:
            trainer.close()
        if lock is not None:
            lock.release()
        rank_watchdog.close()
        distributed.destroy_process_group()
    return 0


def main_once() -> int:
    """`main`, with a user's mistake printed by one rank instead of by all.

    The launcher, or Slurm, ends all ranks as soon as one has ended. So the other ranks wait until
    rank 0 has printed the error; if rank 0 had no error, they print theirs.

    When a rank's process ends, the other ranks print in one line that they stop for that reason.
    Why it ended is printed by that rank, by the launcher (`dsasr.launch.killed_ranks`) or by Slurm.
    """
    try:
        return main()
    except RuntimeError as error:
        if type(error).__name__ == "OutOfMemoryError":
            raise UserError(
                f"rank {os.environ.get('RANK', '0')}: {first_line(error)}; give a smaller "
                f"data.dataloader.batch.frames (or the stage's own batch.frames), which dsasr plan "
                f"batch finds{see('out-of-memory')}"
            ) from error
        if not any(text in str(error) for text in LOST_RANK):
            raise
        rank = os.environ.get("RANK", "0")
        print(f"rank {rank} stops: another rank has ended", file=sys.stderr, flush=True)
        return 1
    except (UserError, Failure):
        if os.environ.get("RANK", "0") != "0":
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the trainer's handler would save
            time.sleep(RANK_0_SECONDS)
        raise


if __name__ == "__main__":
    code = run_tool(main_once)
    from dsasr.utils import distributed

    distributed.end_process(code)
