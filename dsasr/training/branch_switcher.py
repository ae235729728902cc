"""The branches of a run: one in its turn, the other offloaded beside it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from dsasr.build import Builder
from dsasr.checkpoint.tensor_fragments import Fragment, FragmentError, FragmentReader
from dsasr.engine.branch_engine import BranchEngine, partitioner
from dsasr.recipe import Recipe
from dsasr.stages import StageConfig
from dsasr.tracking.monitor import Monitor
from dsasr.utils.errors import UserError


class BranchSwitcher:
    """Those made so far; each is made when it is first needed. Every method is collective."""

    def __init__(self, recipe: Recipe, build: Builder, monitor: Monitor):
        self.recipe, self.build, self.monitor = recipe, build, monitor
        self._made: dict[str, BranchEngine] = {}

    def __iter__(self) -> Iterator[BranchEngine]:
        return iter(self._made.values())

    def made(self, name: str) -> BranchEngine | None:
        """That branch, if it is there."""
        return self._made.get(name)

    def get(self, name: str) -> BranchEngine:
        """That branch, made if it is not there yet."""
        if name not in self._made:
            module = self.build.module(name, partitioner(self.recipe.engine))
            self._made[name] = BranchEngine(name, module, self.recipe.engine, self.recipe.folder)
        return self._made[name]

    def enter(self, stage: StageConfig, steps: int) -> BranchEngine:
        """The branch of ``stage``, in that stage; the other branch is offloaded.

        ``steps``: optimizer steps that the run has made, for the log.
        """
        branch = self.get(stage.branch)
        for other in self:
            if other is not branch:
                other.offload()
        if branch.stage is None or branch.stage.name != stage.name:
            started = time.monotonic()
            branch.enter(stage)
            self.monitor.event(
                "stage",
                name=stage.name,
                branch=branch.name,
                steps=steps,
                switch_seconds=time.monotonic() - started,
            )
        else:
            branch.reload()
        return branch

    def offloaded_bytes(self, beside: str) -> int:
        """What the other branches of the one called ``beside`` have offloaded."""
        return sum(b.offloaded_bytes for b in self if b.name != beside)

    def close(self, name: str) -> None:
        """Nothing needs that branch any more."""
        self._made.pop(name).close()

    # -- saving and loading ------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """What a checkpoint's manifest keeps; `fragments` is the rest."""
        return {
            b.name: {"stage": b.stage.name if b.stage else None, "adam_steps": b.adam_steps()}
            for b in self
        }

    def fragments(self) -> dict[str, Fragment]:
        return {key: fragment for b in self for key, fragment in b.fragments().items()}

    def load(self, reader: FragmentReader) -> None:
        """Go on from what `state` and `fragments` gave, or say that this recipe's cannot."""
        stages = {s.name: s for s in self.recipe.stages}
        try:
            for name, held in reader.manifest["branches"].items():
                self.get(name).load(reader, stages.get(held["stage"]), held["adam_steps"])
        except FragmentError as error:  # with allow_changed: another model, or another part trains
            raise UserError(f"cannot go on: {error}; give run=FOLDER for a new run") from None
