"""The training streams of a run: each branch's, at the place that its steps have come to."""

from __future__ import annotations

from typing import Any

from dsasr.build import Builder
from dsasr.data.batch import Batch
from dsasr.data.dataloader.dataloader import StreamingDataLoader
from dsasr.stages import StageConfig


class TrainDataLoaders:
    """At most one open stream a branch; another stage of the branch opens its own."""

    def __init__(self, build: Builder):
        self._build = build
        self._open: dict[str, tuple[str, StreamingDataLoader]] = {}  # branch: stage, its stream
        self._cursors: dict[str, tuple[str, dict]] = {}  # branch: stage, where its stream stands

    def next(self, stage: StageConfig) -> list[Batch]:
        """This rank's micro-batches of the next step of ``stage``."""
        held = self._open.get(stage.branch)
        if held is None or held[0] != stage.name:
            self.close(stage.branch)
            name, state = self._cursors.get(stage.branch, ("", None))
            stream = self._build.train_dataloader(stage, state if name == stage.name else None)
            self._open[stage.branch] = held = (stage.name, stream)
        batches = [next(held[1]) for _ in range(stage.grad_accum_steps)]
        self._cursors[stage.branch] = (stage.name, batches[-1].state)
        return batches

    def state(self) -> dict[str, Any]:
        """Plain values for `load`: after which batch each branch's stream goes on."""
        return {k: {"stage": name, "state": state} for k, (name, state) in self._cursors.items()}

    def load(self, held: dict[str, Any]) -> None:
        self._cursors = {k: (v["stage"], v["state"]) for k, v in held.items()}

    def close(self, *branches: str) -> None:
        """Close the streams of ``branches``; of all, if none is named."""
        for branch in branches or tuple(self._open):
            _, stream = self._open.pop(branch, ("", None))
            if stream is not None:
                stream.close()
