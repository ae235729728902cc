"""The trainer of a run: both branches, data, drift, logs and checkpoints, in the loop's steps."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping
from typing import NoReturn

from dsasr import config
from dsasr.build import Builder
from dsasr.checkpoint.manager import CheckpointManager
from dsasr.checkpoint.tensor_fragments import FragmentReader
from dsasr.data.batch import Batch
from dsasr.engine.branch_engine import BranchEngine
from dsasr.engine.step_report import StepReport
from dsasr.launch.run_lock import SLURM_START
from dsasr.launch.stop_request import StopRequest
from dsasr.launch.watchdog import Watchdog, for_rank
from dsasr.recipe import Recipe
from dsasr.schedule import GIVEN, Progress, Snapshot, Turn, add_published
from dsasr.stages import StageConfig
from dsasr.tracking import console, tensorboard
from dsasr.tracking.monitor import Monitor
from dsasr.training import (
    frame_statistics,
    initial_weights,
    measure_speech,
    preflight,
    resume,
)
from dsasr.training.branch_switcher import BranchSwitcher
from dsasr.training.dropped_samples import DroppedSamples
from dsasr.training.encoder_swap import EncoderSwap
from dsasr.training.initial_weights import InitialWeights
from dsasr.training.stage_position import progress_in
from dsasr.training.step_evaluation import StepEvaluation
from dsasr.training.train_dataloaders import TrainDataLoaders
from dsasr.utils import distributed
from dsasr.utils.errors import UserError
from dsasr.utils.troubleshooting import see


class Stopped(Exception):
    """The run was asked to stop (`StopRequest`); its checkpoint is written."""


def losses_of(line: Mapping[str, float]) -> list[float]:
    """The losses of a line of metrics; none where every sample of its steps was dropped."""
    return [line[name] for name in ("ctc", "nll") if name in line]


class Trainer:
    """The steps of the loop in `dsasr.train.train`.

    Every public method but `advance` is collective; properties are not.
    """

    def __init__(
        self,
        recipe: Recipe,
        watchdog: Watchdog | None = None,
        request: StopRequest | None = None,
        builder: Builder | None = None,
    ):
        """Open the run folder, and load its newest checkpoint or the initial weights.

        ``watchdog``: the one that has watched this rank since its start; None: a new one.
        ``request``: what asks this rank to stop; None: nothing does. ``builder``: that of
        ``recipe``, with its files checked; None: a new one, which is checked here. Raises
        `UserError` where the run cannot start or resume.
        """
        self.recipe = recipe
        self.schedule = recipe.schedule()
        if builder is None:
            builder = Builder(recipe)
            preflight.check(builder)
        self.builder = builder
        self.checkpoints = CheckpointManager(recipe.folder / "checkpoints", recipe.checkpoint)
        self.progress = Progress()
        self.dataloaders = TrainDataLoaders(self.builder)
        self.stage_seconds: dict[str, float] = {}
        self._step_started = time.monotonic()  # when the last step asked for its batches
        self._data_wait = 0.0  # seconds that it waited for them
        self.request = request or StopRequest()
        self._any_rank_later = distributed.DelayedAnyRank()
        self._finished = False
        self._saved_early = -1  # the run's steps at the last checkpoint before an evaluation
        self._turn_started = time.monotonic()
        self.watchdog = watchdog or for_rank(recipe.folder, recipe.watchdog)
        self.watchdog.set_start(distributed.broadcast(f"{time.time_ns()}"))
        if watchdog is not None:
            watchdog.at("loading")
        reader, passed_over = resume.find_checkpoint(recipe, self.checkpoints)
        if reader is not None:
            resume.check_contents(reader.manifest, self.builder)
        self._contents = resume.contents(self.builder)
        sources = initial_weights.plan(self.builder) if reader is None else []
        resume.save_recipe(recipe)
        resume.save_environment(recipe)
        measure_speech.save(self.builder)
        if reader is None:
            initial_weights.keep_files(self.builder, sources)
        self.monitor = Monitor(
            recipe.folder,
            recipe.monitor,
            self._total_steps(),
            *((reader.manifest["steps"], reader.manifest["monitor"]["written"]) if reader else ()),
            stages={stage.name: stage.branch for stage in recipe.stages},
            hparams=tensorboard.hparams(config.to_plain(recipe)),
        )
        self.branches = BranchSwitcher(recipe, self.builder, self.monitor)
        self.encoder_swap = EncoderSwap(recipe, self.builder, self.monitor)
        self.evaluation = StepEvaluation(recipe, self.builder, self.monitor, self.watchdog)
        # A pretrained encoder's frame statistics are measured on the first batches.
        self._frames_are_known = recipe.pretrained_encoder is None
        dropped = (reader.manifest["bad_samples"], reader.manifest["steps"]) if reader else ({}, 0)
        self.bad_samples = DroppedSamples(recipe, self.monitor, *dropped)
        self._start(reader, passed_over, sources)

    # -- start, resume -----------------------------------------------------------------------

    @property
    def steps(self) -> int:
        """Optimizer steps done, over both branches."""
        return self.progress.steps

    @property
    def histograms_every(self) -> int:
        """Steps between two histograms of the gradients; 0 where none is written."""
        monitor = self.recipe.monitor
        return monitor.gradients if monitor.tensorboard else 0

    def _total_steps(self) -> int:
        """Optimizer steps of this job, over its branches."""
        return sum(s.steps for s in self.recipe.stages if s.branch in self.recipe.branches)

    def _start(
        self,
        reader: FragmentReader | None,
        passed_over: list[str],
        sources: list[InitialWeights],
    ) -> None:
        if self.schedule.pretrain and self.recipe.branch != "sft":
            self.encoder_swap.claim(fresh=reader is None)
        if reader is not None:
            self._restore(reader)
            self.monitor.event("resumed", steps=self.steps, checkpoint=reader.folder.name)
        else:
            initial_weights.load(self.builder, sources, self.branches, self.monitor)
            if self.recipe.has_initial_encoder:
                given = Snapshot(GIVEN, 0, GIVEN)
                self.progress = add_published(self.progress, [given])
        for reason in passed_over:
            self.monitor.event("checkpoint_passed_over", reason=reason, steps=self.steps)

    def _restore(self, reader: FragmentReader) -> None:
        manifest = reader.manifest
        self.progress = progress_in(manifest, self.schedule)
        self.branches.load(reader)
        self.dataloaders.load(manifest["streams"])
        self.stage_seconds = dict(manifest["stage_seconds"])
        self.monitor.load(manifest["monitor"])
        # A finished run whose stage table was extended goes on.
        at_end = self.schedule.next_turn(self.progress).kind == "end"
        self._finished = manifest["finished"] and at_end
        self.evaluation.load(manifest)
        self.encoder_swap.load(reader, self.progress)

    # -- steps -------------------------------------------------------------------------------

    def next_turn(self) -> Turn:
        """The schedule's next turn; the sft job of a concurrent run polls the store before it."""
        self.watchdog.at("turn", step=self.steps)
        if self._any_rank_later(bool(self.request.cause)):
            self._stop()
        if self.recipe.branch == "sft":
            self.progress = self.encoder_swap.poll(self.progress)
        return self.schedule.next_turn(self.progress)

    def enter(self, stage: StageConfig) -> BranchEngine:
        """The engine of the stage's branch, in that stage; the other branch is offloaded."""
        self._turn_started = time.monotonic()
        self.watchdog.at("stage", stage.name)
        return self.branches.enter(stage, self.steps)

    def next_batches(self, stage: StageConfig) -> list[Batch]:
        """This rank's micro-batches of the next step.

        Before a stage's first step the online probe stores the encoder's frames for its CKA; on the
        first batches of pretraining a pretrained encoder's frame statistics are measured.
        """
        step = self.progress.step
        if stage.branch == "pretrain":
            _, step = self.schedule.pretrain_stage(self.progress.pretrain)
        engine = self.branches.get(stage.branch)
        if self._has_encoder(engine):
            # The probe's time does not count as the stage's.
            self._turn_started += self.evaluation.online_probe.take_reference(engine, step)
        self._step_started = time.monotonic()
        self.watchdog.at("data", stage.name)
        batches = self.dataloaders.next_batches(stage)
        self.watchdog.at("step", keys=[key for batch in batches for key in batch.keys])
        self._data_wait = time.monotonic() - self._step_started
        for batch in batches:
            self.bad_samples.add(batch.bad, steps=self.steps, stage=stage.name, epoch=batch.epoch)
        if stage.branch == "pretrain" and not self._frames_are_known:
            self._frames_are_known = frame_statistics.measure(engine, batches)
        return batches

    def advance(self, turn: Turn) -> None:
        """Count the step of ``turn`` as done, and its time as its stage's."""
        self.progress = self.schedule.advance(self.progress, turn)
        name = turn.stage.name
        seconds = self.stage_seconds.get(name, 0.0) + time.monotonic() - self._turn_started
        self.stage_seconds[name] = seconds
        if turn.step + 1 == turn.stage.steps:
            self.monitor.event("stage_end", name=name, steps=self.steps, stage_seconds=seconds)

    # -- encoders ----------------------------------------------------------------------------

    def check_drift(self) -> tuple[str | None, float | None]:
        """Measure drift if due after this pretrain step; returns (cause to publish, CKA)."""
        self.watchdog.at("drift")
        trained_seconds = sum(self.stage_seconds.values())
        live = self.branches.get("pretrain")
        return self.encoder_swap.check_drift(live, self.progress, trained_seconds)

    def publish_encoder(self, cause: str, cka: float | None) -> None:
        """Publish the live encoder for the sft branch."""
        self.watchdog.at("publish")
        live = self.branches.get("pretrain")
        self.progress = self.encoder_swap.publish(live, self.progress, cause, cka)

    def swap_encoder(self, sft: BranchEngine, snapshot: Snapshot) -> bool:
        """Load ``snapshot`` into the sft branch; False when it is refused (an event says why)."""
        self.watchdog.at("swap")
        live = self.branches.get_if_built("pretrain")
        self.progress, swapped = self.encoder_swap.swap(self.progress, snapshot, sft, live)
        if swapped and snapshot.cause == "final" and live is not None:
            # Nothing needs the pretrain branch any more.
            self.branches.close("pretrain")
            self.dataloaders.close("pretrain")
        return swapped

    def wait_for_encoder(self) -> None:
        """Sleep until the next poll of the store, where no step is possible before an encoder."""
        before = self.progress
        self.progress = self.encoder_swap.wait_or_give_up(before)
        if self.progress == before:
            self.stop_if_asked()
            time.sleep(self.recipe.store.poll_seconds)

    # -- logs --------------------------------------------------------------------------------

    def log(self, report: StepReport) -> None:
        """Log the step; once a log interval, check for non-finite losses and bad data.

        Raises `UserError` for a loss or gradient that is not finite, and for more bad samples than
        the recipe allows.
        """
        stage = next(s for s in self.recipe.stages if s.name == report.stage)
        last = report.step + 1 == stage.steps
        # The same on all ranks, and checked at every step: no broken weight is ever saved.
        if isinstance(report.grad_norm, float) and not math.isfinite(report.grad_norm):
            self._raise_not_finite(report)
        self.bad_samples.count_step(report)
        extra = self._branch_metrics(report)
        seconds = time.monotonic() - self._step_started
        line = self.monitor.step(report, self.steps, self._data_wait, last, extra, seconds)
        if line is None:
            return
        grad_norm = line.get("grad_norm", 0.0)
        if not all(map(math.isfinite, [*losses_of(line), grad_norm])):
            self._raise_not_finite(report)
        if report.branch == "sft" and "nll" in line:
            self.encoder_swap.log_loss(line["nll"], self.progress)
        self.bad_samples.check(report, self.steps, last, usable=bool(losses_of(line)))
        if report.branch == "pretrain":
            self.encoder_swap.store.beat()

    def _branch_metrics(self, report: StepReport) -> dict[str, float]:
        """Bytes that the other branch has offloaded; for the sft branch also the pretrain step of
        the encoder in use."""
        offloaded = self.branches.offloaded_bytes(active=report.branch)
        values = {"offloaded_bytes": float(offloaded)}
        in_use = [s for s in self.progress.published if s.id == self.progress.in_use]
        if report.branch == "sft" and in_use:
            values["encoder_in_use"] = float(in_use[0].pretrain)
        return values

    def _raise_not_finite(self, report: StepReport) -> None:
        keys = ", ".join(k for b in report.batches for k in b.keys[:3])
        raise UserError(
            f"stage {report.stage}, step {report.step + 1}: the loss or its gradient is not "
            f"finite (last batch of rank 0: {keys} …); resume from the last checkpoint with "
            f"a lower rate{see('not-finite')}"
        )

    def stop_if_asked(self) -> None:
        """Save and raise `Stopped` if any rank was asked to stop; waits for the device."""
        later = self._any_rank_later.settle()
        if distributed.any_rank(bool(self.request.cause)) or later:
            self._stop()

    def _stop(self) -> NoReturn:
        self.request.saving = True
        self._any_rank_later.settle()
        causes = [c for c in distributed.all_gather_object(self.request.cause) if c]
        saved = self.save()
        # By this name the batch script of a Slurm job knows that the event is of its own start.
        start = {"start": os.environ[SLURM_START]} if SLURM_START in os.environ else {}
        self.monitor.event("stopped", steps=self.steps, cause=causes[0], **start)
        self._plot()
        if not saved:
            raise UserError(f"stopped by {causes[0]}, and the checkpoint could not be written")
        raise Stopped

    # -- evaluation --------------------------------------------------------------------------

    def evaluate_if_due(self, engine: BranchEngine, report: StepReport) -> None:
        """Online probe and validation of the branch after its step, each at its interval.

        A checkpoint is saved first, unless the last one is recent: an evaluation may run out of
        memory and end the process, and no training is to be lost with it.
        """
        if not self._has_encoder(engine) or not self.evaluation.is_due(engine.stage, report.step):
            return
        self.evaluation.running = {"branch": engine.name, "step": report.step}
        if self.checkpoints.due_early(self.steps) and self.save():
            self._saved_early = self.steps
        self._evaluate_after(engine, report.step)

    def finish_evaluation(self) -> None:
        """Repeat the evaluation in which the process before this one ended, if it did."""
        cut_off = self.evaluation.running
        engine = self.branches.get_if_built(cut_off["branch"]) if cut_off else None
        stage = engine.stage if engine is not None else None  # None: it left the stage table
        if stage is None or not self.evaluation.is_due(stage, cut_off["step"]):
            self.evaluation.running = None
            return
        self.branches.enter(stage, self.steps)
        self.monitor.event("evaluation_repeated", stage=stage.name, steps=self.steps)
        self._evaluate_after(engine, cut_off["step"])

    def _evaluate_after(self, engine: BranchEngine, step: int) -> None:
        self.evaluation.run(engine, step, self.steps, sum(self.stage_seconds.values()))

    def _has_encoder(self, engine: BranchEngine) -> bool:
        """Whether the branch has an encoder: training on text alone begins without one."""
        return engine.name == "pretrain" or self.progress.in_use is not None

    # -- checkpoints -------------------------------------------------------------------------

    def save_if_due(self) -> None:
        """Save a checkpoint at its interval, or at the best validation score so far."""
        self._log_checkpoints()
        keeps_best = self.recipe.checkpoint.keep_best
        validation = self.evaluation.validation
        best = keeps_best and validation.is_best(self.steps)
        # A checkpoint saved just before this evaluation lacks nothing but the evaluation's score.
        scored = keeps_best and validation.score(self.steps) is not None
        saved = self._saved_early == self.steps and not scored
        if (self.checkpoints.due(self.steps) and not saved) or best:
            self.save(wait=False)

    def _log_checkpoints(self) -> None:
        for checkpoint in self.checkpoints.finished_saves():
            if checkpoint.failure is not None:
                self.monitor.event(
                    "checkpoint_failed", reason=checkpoint.failure, steps=checkpoint.steps
                )
                continue
            self.monitor.event(
                "checkpoint",
                name=checkpoint.path.name,
                steps=checkpoint.steps,
                save_seconds=checkpoint.seconds,
                stall_seconds=checkpoint.stall,
            )

    def save(self, wait: bool = True) -> bool:
        """Write a checkpoint; returns whether it is written. A full disk does not stop the run.

        Without ``wait`` it is written while training goes on, and True does not mean written.
        """
        self.watchdog.at("checkpoint")
        fragments = self.branches.fragments() | self.encoder_swap.fragments()
        state = {
            "progress": config.to_plain(self.progress),
            "branches": self.branches.state(),
            "streams": self.dataloaders.state(),
            "stage_seconds": self.stage_seconds,
            "monitor": self.monitor.state(),
            "bad_samples": self.bad_samples.count(),
            "finished": self._finished,
            **self.evaluation.state(),
            **self.encoder_swap.state(),
            "vocabularies": self.builder.vocabularies,
            "contents": self._contents,
            "recipe": config.to_plain(self.recipe),
        }
        score = self.evaluation.validation.score(self.steps)
        saved = True
        try:
            self.checkpoints.save(self.steps, fragments, state, score, wait)
            self.encoder_swap.keep_for_resume(self.progress)
        except OSError:
            saved = False
        self._log_checkpoints()
        return saved

    # -- end ---------------------------------------------------------------------------------

    def finish(self) -> None:
        """After the last step: save, evaluate on the validation set, plot the timeline.

        If the process ends in the evaluation, the run resumes after its last step and repeats the
        evaluation alone.
        """
        self.stop_if_asked()
        if self._finished:
            self.monitor.event("was_finished", steps=self.steps)
        else:
            self._save_the_end()
            utterances = self.recipe.evaluation.final_utterances
            for engine in self.branches:
                if engine.stage is not None and self._has_encoder(engine):
                    self.evaluation.validate(engine, utterances, self.steps)
            self._finished = True
            self._save_the_end()
        self.monitor.event("finished", steps=self.steps)
        self._plot()

    def _save_the_end(self) -> None:
        if not self.save():
            raise UserError(
                f"trained to the end, but {self.checkpoints.folder} cannot be written: make "
                "room and start again, which repeats the steps since the last checkpoint"
            )

    def _plot(self) -> None:
        """``timeline.png`` in the run folder; a plot that fails stops no run."""
        if not distributed.is_main_rank():
            return
        from dsasr.tracking.timeline_plot import plot_run

        try:
            plot_run(self.recipe.folder)
        except (OSError, ValueError, ImportError) as error:
            print(console.warning_line(f"timeline.png was not drawn: {error}"), flush=True)

    def close(self) -> None:
        """End the dataloader workers, the watchdog and the background writes; close the logs."""
        self.dataloaders.close()
        self.watchdog.close()
        self.checkpoints.close()
        self._log_checkpoints()
        self.monitor.close()
