"""The training dataloaders of a run: one for each branch, at the position of its steps."""

from __future__ import annotations

from typing import Any

from dsasr.build import Builder
from dsasr.data.batch import Batch
from dsasr.data.dataloader.dataloader import StreamingDataLoader
from dsasr.stages import StageConfig


class TrainDataLoaders:
    """At most one open dataloader a branch; each stage of the branch opens its own."""

    def __init__(self, builder: Builder):
        self._builder = builder
        self._open: dict[str, tuple[str, StreamingDataLoader]] = {}  # branch: stage, dataloader
        self._cursors: dict[str, tuple[str, dict]] = {}  # branch: stage, its dataloader's state

    def next_batches(self, stage: StageConfig) -> list[Batch]:
        """This rank's micro-batches of the next step of ``stage``."""
        dataloader = self._dataloader(stage)
        batches = [next(dataloader) for _ in range(stage.grad_accum_steps)]
        self._cursors[stage.branch] = (stage.name, batches[-1].state)
        return batches

    def _dataloader(self, stage: StageConfig) -> StreamingDataLoader:
        open_stage, dataloader = self._open.get(stage.branch, ("", None))
        if open_stage != stage.name:
            self.close(stage.branch)
            cursor_stage, state = self._cursors.get(stage.branch, ("", None))
            state = state if cursor_stage == stage.name else None
            dataloader = self._builder.train_dataloader(stage, state)
            self._open[stage.branch] = (stage.name, dataloader)
        return dataloader

    def state(self) -> dict[str, Any]:
        """Plain values for `load`: each branch's stage and the state after its last batch."""
        return {k: {"stage": name, "state": state} for k, (name, state) in self._cursors.items()}

    def load(self, state: dict[str, Any]) -> None:
        self._cursors = {k: (v["stage"], v["state"]) for k, v in state.items()}

    def close(self, *branches: str) -> None:
        """Close the dataloaders of ``branches``; all of them, if none is named."""
        for branch in branches or tuple(self._open):
            _, dataloader = self._open.pop(branch, ("", None))
            if dataloader is not None:
                dataloader.close()
