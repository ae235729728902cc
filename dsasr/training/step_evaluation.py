"""What is evaluated after a training step: online probe and validation, each at its interval."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from dsasr.build import Builder
from dsasr.engine.branch_engine import BranchEngine
from dsasr.launch.watchdog import Watchdog
from dsasr.recipe import Recipe
from dsasr.stages import StageConfig
from dsasr.tracking.monitor import Monitor
from dsasr.training.online_probe import OnlineProbe
from dsasr.training.validation import Validation


class StepEvaluation:
    """Online probe and validation of a branch after its step. `run` and `validate` are collective.

    An evaluation may run out of memory and end the process. So a checkpoint is saved before it,
    whose `state` names the evaluation that is ``running``, and a resumed run repeats that one.
    """

    def __init__(self, recipe: Recipe, builder: Builder, monitor: Monitor, watchdog: Watchdog):
        self.recipe, self.watchdog = recipe, watchdog
        self.validation = Validation(recipe, builder, monitor)
        self.online_probe = OnlineProbe(
            recipe.probe, builder, monitor, recipe.folder / "allocation"
        )
        self.running: dict[str, Any] | None = None  # branch, and the step of its stage

    def is_due(self, stage: StageConfig, step: int) -> bool:
        """Whether something is evaluated after ``step`` of ``stage``."""
        return self._validates_after(step) or self.online_probe.comes_after(stage, step)

    def run(self, engine: BranchEngine, step: int, steps: int, trained_seconds: float) -> None:
        """Evaluate the branch after ``step`` of its stage; one that fails is an event.

        ``steps``: those of the run; ``trained_seconds``: its training time so far.
        """
        if self.online_probe.comes_after(engine.stage, step):
            probe = partial(self.online_probe.evaluate, engine, step, steps, trained_seconds)
            self.validation.attempt(probe, engine.stage.name, steps)
        if self._validates_after(step):
            self.validate(engine, self.recipe.evaluation.utterances, steps)
        self.running = None

    def validate(self, engine: BranchEngine, utterances: int, steps: int) -> None:
        """Evaluate the branch on ``utterances`` of the validation set (0: all), under the
        watchdog; ``steps``: those of the run."""
        watched = partial(self.watchdog.each, doing="evaluation")
        self.validation.evaluate(engine, utterances, steps, watched)

    def state(self) -> dict[str, Any]:
        """Plain values for a checkpoint's manifest."""
        return {"best_score": self.validation.best, "evaluating": self.running}

    def load(self, manifest: Mapping[str, Any]) -> None:
        """Restore `state`."""
        self.validation.best = manifest.get("best_score")
        self.running = manifest.get("evaluating")

    def _validates_after(self, step: int) -> bool:
        every = self.recipe.evaluation.every
        return bool(every) and (step + 1) % every == 0
