"""One run: its two branches and all that goes with them, in the steps that `train.py` orders."""

from __future__ import annotations

import math
import signal
import time
from collections import Counter
from collections.abc import Mapping
from functools import partial
from typing import Any

from dsasr import config
from dsasr.build import Builder
from dsasr.checkpoint.manager import CheckpointManager
from dsasr.checkpoint.tensor_fragments import FragmentReader
from dsasr.data.batch import Batch
from dsasr.data.dataloader.bad_samples import BadSampleLog
from dsasr.engine.branch_engine import BranchEngine
from dsasr.engine.step_report import StepReport
from dsasr.launch.watchdog import Watchdog, for_rank
from dsasr.recipe import Recipe
from dsasr.stages import Progress, Snapshot, StageConfig, Turn, with_published
from dsasr.tracking.monitor import Monitor
from dsasr.training import resume
from dsasr.training.branch_switcher import BranchSwitcher
from dsasr.training.encoder_swap import GIVEN, EncoderSwap
from dsasr.training.online_probe import OnlineProbe
from dsasr.training.train_dataloaders import TrainDataLoaders
from dsasr.training.validation import Validation
from dsasr.utils import distributed
from dsasr.utils.errors import UserError


class Stopped(Exception):
    """The run was asked to stop; its checkpoint is written."""


class Trainer:
    """What `train.py` drives. Every public method is collective."""

    def __init__(self, recipe: Recipe, watchdog: Watchdog | None = None):
        """``watchdog``: the one that has seen this rank through its start, if there is one."""
        self.recipe = recipe
        self.schedule = recipe.schedule()
        self.build = Builder(recipe)
        self.build.check()
        self.checkpoints = CheckpointManager(recipe.folder / "checkpoints", recipe.checkpoint)
        self.progress = Progress()
        self.feeds = TrainDataLoaders(self.build)
        self._wait = 0.0
        self._signal: int | None = None
        self._finished = False
        self.stage_seconds: dict[str, float] = {}
        self._turn_started = time.monotonic()
        self.watchdog = watchdog or for_rank(recipe.folder, recipe.watchdog)
        self.watchdog.set_start(distributed.broadcast(f"{time.time_ns()}"))
        if watchdog is not None:
            watchdog.at("loading")
        reader, passed_over = resume.choose(recipe, self.checkpoints)
        resume.keep_recipe(recipe)
        self.monitor = Monitor(
            recipe.folder,
            recipe.monitor,
            self._total_steps(),
            *((reader.manifest["steps"], reader.manifest["monitor"]["written"]) if reader else ()),
        )
        self.branches = BranchSwitcher(recipe, self.build, self.monitor)
        self.exchange = EncoderSwap(recipe, self.build, self.monitor)
        self.validation = Validation(recipe, self.build, self.monitor)
        self.watch = OnlineProbe(
            recipe.probe, self.build, self.monitor, recipe.folder / "allocation"
        )
        self.bad = BadSampleLog(
            recipe.folder / "bad_samples.jsonl", recipe.data.bad_limits, rank=distributed.rank()
        )
        self._bad_told = reader.manifest["bad_samples"] if reader else {}  # by the last line
        # Before any collective call: no rank may write its file while rank 0 cuts it.
        self.bad.resume(self._bad_told, reader.manifest["steps"] if reader else 0)
        self._begin(reader, passed_over)

    # -- start, resume -----------------------------------------------------------------------

    @property
    def steps(self) -> int:
        """Optimizer steps done, over both branches."""
        return self.progress.steps

    def _total_steps(self) -> int:
        wanted = {"both": ("pretrain", "sft")}.get(self.recipe.branch, (self.recipe.branch,))
        return sum(s.steps for s in self.recipe.stages if s.branch in wanted)

    def _begin(self, reader: FragmentReader | None, passed_over: list[str]) -> None:
        if self.schedule.pretrain and self.recipe.branch != "sft":
            self.exchange.claim(fresh=reader is None)
        if reader is not None:
            self._restore(reader)
            self.monitor.event("resumed", steps=self.steps, checkpoint=reader.folder.name)
        elif self.recipe.encoder_given:
            given = Snapshot(GIVEN, 0, "given")
            self.progress = with_published(self.progress, [given])
        for reason in passed_over:
            self.monitor.event("checkpoint_passed_over", reason=reason, steps=self.steps)
        signal.signal(signal.SIGTERM, self._on_signal)
        signal.signal(signal.SIGUSR1, self._on_signal)

    def _on_signal(self, number: int, _frame: Any) -> None:
        self._signal = number

    def _restore(self, reader: FragmentReader) -> None:
        held = reader.manifest
        published = tuple(Snapshot(**s) for s in held["progress"].pop("published"))
        self.progress = Progress(**held["progress"], published=published)
        self.branches.load(reader)
        self.feeds.load(held["streams"])
        self.stage_seconds = dict(held["stage_seconds"])
        self.monitor.load(held["monitor"])
        self._finished = held["finished"]
        self.validation.best = held.get("best_score")
        self.exchange.load(reader)

    # -- turns -------------------------------------------------------------------------------

    def turn(self) -> Turn:
        """What comes next; in a concurrent run after a look at the store."""
        self.watchdog.at("turn", step=self.steps)
        if self.recipe.branch == "sft":
            self.progress = self.exchange.poll(self.progress)
        return self.schedule.at(self.progress)

    def enter(self, stage: StageConfig) -> BranchEngine:
        """The branch of ``stage``, in that stage; the other branch is offloaded."""
        self._turn_started = time.monotonic()
        self.watchdog.at("stage", stage.name)
        return self.branches.enter(stage, self.steps)

    def batches(self, stage: StageConfig) -> list[Batch]:
        """This rank's micro-batches of the next step; what looks compare with is taken before."""
        step = self.progress.step if stage.branch == "sft" else self.progress.pretrain
        # Like looks, that is no time of the stage's.
        self._turn_started += self.watch.begin(self.branches.get(stage.branch), step)
        started = time.monotonic()
        self.watchdog.at("data", stage.name)
        batches = self.feeds.next(stage)
        self.watchdog.at("step", keys=[key for batch in batches for key in batch.keys])
        self._wait = time.monotonic() - started
        for batch in batches:
            self.bad.add(batch.bad, steps=self.steps, stage=stage.name, epoch=batch.epoch)
        return batches

    def advance(self, turn: Turn) -> None:
        """Count the step that was made, and the time that its stage has taken."""
        self.progress = self.schedule.advance(self.progress, turn)
        name = turn.stage.name
        spent = self.stage_seconds.get(name, 0.0) + time.monotonic() - self._turn_started
        self.stage_seconds[name] = spent
        if turn.step + 1 == turn.stage.steps:
            self.monitor.event("stage_end", name=name, steps=self.steps, stage_seconds=spent)

    # -- encoders ----------------------------------------------------------------------------

    def swap(self, branch: BranchEngine, snapshot: Snapshot) -> bool:
        """Put ``snapshot`` into the sft branch; False when it was refused (the log says why)."""
        self.watchdog.at("swap")
        live = self.branches.made("pretrain")
        self.progress, taken = self.exchange.swap(self.progress, snapshot, branch, live)
        if taken and snapshot.cause == "final" and live is not None:
            # Nothing needs the pretrain branch any more.
            self.branches.close("pretrain")
            self.feeds.close("pretrain")
        return taken

    def drift_cause(self) -> tuple[str | None, dict[str, Any]]:
        """Whether to publish the encoder after this pretrain step, and what was measured."""
        self.watchdog.at("drift")
        trained = sum(self.stage_seconds.values())
        live = self.branches.get("pretrain")
        return self.exchange.drift_cause(live, self.progress, trained)

    def publish(self, cause: str, found: Mapping[str, Any]) -> None:
        """Publish the live encoder for the sft branch."""
        self.watchdog.at("publish")
        live = self.branches.get("pretrain")
        self.progress = self.exchange.publish(live, self.progress, cause, found)

    def wait(self) -> None:
        """Nothing can step before the publisher has moved on; the recipe says how long."""
        before = self.progress
        self.progress = self.exchange.late(before)
        if self.progress == before:
            self._check_signal()
            time.sleep(self.recipe.store.poll_seconds)

    # -- reports -----------------------------------------------------------------------------

    def write(self, report: StepReport) -> None:
        """Count the step; at a line also look for bad numbers, bad data and a wish to stop."""
        stage = next(s for s in self.recipe.stages if s.name == report.stage)
        last = report.step + 1 == stage.steps
        # The same on all ranks, and at hand where it is not finite: no broken weight is ever saved.
        if isinstance(report.grad_norm, float) and not math.isfinite(report.grad_norm):
            self._not_finite(report)
        line = self.monitor.step(report, self.steps, self._wait, last, self._encoder_line(report))
        if line is None:
            return
        losses = [v for k, v in line.items() if k in ("ctc", "nll", "grad_norm")]
        if not all(map(math.isfinite, losses)):
            self._not_finite(report)
        if report.branch == "sft":
            self.exchange.line(line["nll"], self.progress)
        counts = self._bad_counts()
        if counts != self._bad_told:
            self._bad_told = counts
            head = {"steps": self.steps, "branch": report.branch, "stage": "bad_samples"}
            self.monitor.scalars(head, counts)
            self.monitor.event("bad_samples", steps=self.steps, **counts)
        self.bad.check(counts)
        if report.branch == "pretrain":
            self.exchange.store.beat()
        self._check_signal()

    def _bad_counts(self) -> dict[str, int]:
        """Dropped samples of the run by cause, over all ranks; collective."""
        counts: Counter[str] = Counter()
        for held in distributed.all_gather_object(dict(self.bad.counts)):
            counts.update(held)
        return dict(sorted(counts.items()))

    def _encoder_line(self, report: StepReport) -> dict[str, float]:
        """The sft branch's encoder in use; for both, the bytes that the other branch offloaded."""
        values = {"offloaded_bytes": float(self.branches.offloaded_bytes(beside=report.branch))}
        in_use = [s for s in self.progress.published if s.id == self.progress.in_use]
        if report.branch == "sft" and in_use:
            values["encoder_in_use"] = float(in_use[0].pretrain)
        return values

    def _not_finite(self, report: StepReport) -> None:
        keys = ", ".join(k for b in report.batches for k in b.keys[:3])
        raise UserError(
            f"stage {report.stage}, step {report.step + 1}: the loss or its gradient is not "
            f"finite (last batch of rank 0: {keys} …); resume from the last checkpoint with "
            "a lower rate"
        )

    def _check_signal(self) -> None:
        if distributed.any_rank(self._signal is not None):
            saved = self.save()
            self.monitor.event("stopped", steps=self.steps, signal=self._signal)
            self._plot()
            if not saved:
                raise UserError("stopped by a signal, and the checkpoint could not be written")
            raise Stopped

    def evaluate_if_due(self, branch: BranchEngine, report: StepReport) -> None:
        trained = sum(self.stage_seconds.values())
        self.watch.look_if_due(branch, report, self.steps, trained)
        every = self.recipe.evaluation.every
        if every and (report.step + 1) % every == 0:
            self._evaluate(branch, self.recipe.evaluation.utterances)

    def _evaluate(self, branch: BranchEngine, utterances: int) -> None:
        watched = partial(self.watchdog.each, doing="evaluation")
        self.validation.evaluate(branch, utterances, self.steps, watched)

    # -- saving ------------------------------------------------------------------------------

    def save_if_due(self) -> None:
        self._tell_checkpoints()
        best = self.recipe.checkpoint.keep_best and self.validation.is_best(self.steps)
        if self.checkpoints.due(self.steps) or best:
            self.save(wait=False)

    def _tell_checkpoints(self) -> None:
        for one in self.checkpoints.finished_saves():
            if one.failure is not None:
                self.monitor.event("checkpoint_failed", reason=one.failure, steps=one.steps)
                continue
            self.monitor.event(
                "checkpoint",
                name=one.path.name,
                steps=one.steps,
                save_seconds=one.seconds,
                stall_seconds=one.stall,
            )

    def save(self, wait: bool = True) -> bool:
        """Write a checkpoint of everything; a full disk costs the checkpoint, not the run.

        Without ``wait`` it is written while training goes on, and True promises nothing.
        """
        self.watchdog.at("checkpoint")
        held = self.branches.fragments() | self.exchange.fragments()
        state = {
            "progress": config.to_plain(self.progress),
            "branches": self.branches.state(),
            "streams": self.feeds.state(),
            "stage_seconds": self.stage_seconds,
            "monitor": self.monitor.state(),
            "bad_samples": self._bad_counts(),
            "finished": self._finished,
            "best_score": self.validation.best,
            **self.exchange.state(),
            "recipe": config.to_plain(self.recipe),
        }
        score = self.validation.score(self.steps)
        done = True
        try:
            self.checkpoints.save(self.steps, held, state, score, wait)
        except OSError:
            done = False
        self._tell_checkpoints()
        return done

    def finish(self) -> None:
        """The end of the schedule: evaluate on the whole validation set and save."""
        if not self._finished:
            self._finished = True
            for branch in self.branches:
                if branch.stage is not None:
                    self._evaluate(branch, 0)
            if not self.save():
                raise UserError(
                    f"trained to the end, but {self.checkpoints.folder} cannot be written: make "
                    "room and start again, which repeats the steps since the last checkpoint"
                )
        self.monitor.event("finished", steps=self.steps)
        self._plot()

    def _plot(self) -> None:
        """``timeline.png`` in the run folder; a picture that fails is no reason to."""
        if not distributed.is_main_rank():
            return
        from dsasr.tracking.timeline_plot import plot_run

        try:
            plot_run(self.recipe.folder)
        except (OSError, ValueError, ImportError) as error:
            print(f"timeline.png was not drawn: {error}", flush=True)

    def close(self) -> None:
        self.feeds.close()
        self.watchdog.close()
        self.checkpoints.close()
        self._tell_checkpoints()
        self.monitor.close()
