"""The branch engines of a run: one is in training, the other is offloaded."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from dsasr.build import Builder
from dsasr.checkpoint.tensor_fragments import Fragment, FragmentError, FragmentReader
from dsasr.engine.branch_engine import BranchEngine
from dsasr.engine.partitioner import partitioner
from dsasr.recipe import Recipe
from dsasr.stages import StageConfig
from dsasr.tracking.monitor import Monitor
from dsasr.utils.errors import UserError


class BranchSwitcher:
    """A `BranchEngine` for each branch, built when first needed. Every method is collective."""

    def __init__(self, recipe: Recipe, builder: Builder, monitor: Monitor):
        self.recipe, self.builder, self.monitor = recipe, builder, monitor
        self._engines: dict[str, BranchEngine] = {}

    def __iter__(self) -> Iterator[BranchEngine]:
        """The engines built so far."""
        return iter(self._engines.values())

    def get_if_built(self, branch: str) -> BranchEngine | None:
        """The engine of ``branch``, or None if it is not built yet."""
        return self._engines.get(branch)

    def get(self, branch: str) -> BranchEngine:
        """The engine of ``branch``, built if it is not yet."""
        if branch not in self._engines:
            config, folder = self.recipe.engine, self.recipe.folder
            module = self.builder.module(branch, partitioner(config))
            self._engines[branch] = BranchEngine(branch, module, config, folder)
        return self._engines[branch]

    def enter(self, stage: StageConfig, steps: int) -> BranchEngine:
        """The engine of the stage's branch, in that stage; the other branch is offloaded.

        ``steps``: optimizer steps done in the run, for the log.
        """
        engine = self.get(stage.branch)
        for built in self:
            if built is not engine:
                built.offload()
        if engine.stage is None or engine.stage.name != stage.name:
            started = time.monotonic()
            engine.enter(stage)
            self.monitor.event(
                "stage",
                name=stage.name,
                branch=engine.name,
                steps=steps,
                switch_seconds=time.monotonic() - started,
            )
        else:
            engine.reload()
        return engine

    def offloaded_bytes(self, active: str) -> int:
        """Bytes offloaded by the branch that is not ``active``."""
        return sum(engine.offloaded_bytes for engine in self if engine.name != active)

    def close(self, branch: str) -> None:
        """Free a branch that is not needed any more."""
        self._engines.pop(branch).close()

    # -- saving and loading ------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """The plain values for a checkpoint's manifest; its tensors are `fragments`."""
        return {
            engine.name: {
                "stage": engine.stage.name if engine.stage else None,
                "adam_steps": engine.adam_steps(),
            }
            for engine in self
        }

    def fragments(self) -> dict[str, Fragment]:
        """Weights, masters and moments of both branches, for a checkpoint."""
        return {key: fragment for engine in self for key, fragment in engine.fragments().items()}

    def load(self, reader: FragmentReader) -> None:
        """Restore `state` and `fragments`; raises `UserError` where this recipe's model differs."""
        stages = {s.name: s for s in self.recipe.stages}
        try:
            for branch, state in reader.manifest["branches"].items():
                self.get(branch).load(reader, stages.get(state["stage"]), state["adam_steps"])
        except FragmentError as error:  # with allow_changed: another model, or another part trains
            raise UserError(f"cannot go on: {error}; give run=FOLDER for a new run") from None
