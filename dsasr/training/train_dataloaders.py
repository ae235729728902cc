"""The training dataloaders of a run: one for each branch, at the position of its steps."""

from __future__ import annotations

from typing import Any

from dsasr.build import Builder
from dsasr.data.batch import Batch
from dsasr.data.dataloader.dataloader import StreamingDataLoader
from dsasr.data.dataloader.text_dataloader import TextDataLoader
from dsasr.stages import StageConfig

SPEECH, TEXT = "state", "text"  # the kinds of a stage's dataloaders, as in a checkpoint


class TrainDataLoaders:
    """At most one open dataloader a branch and kind; each stage of the branch opens its own."""

    def __init__(self, builder: Builder):
        self._builder = builder
        # branch: stage, its dataloaders
        self._open: dict[str, tuple[str, dict[str, StreamingDataLoader | TextDataLoader]]] = {}
        # branch: stage, the states of its dataloaders, and the micro-batches so far if it has text
        self._cursors: dict[str, tuple[str, dict[str, Any]]] = {}

    def next_batches(self, stage: StageConfig) -> list[Batch]:
        """This rank's micro-batches of the next step of ``stage``."""
        cursor_stage, cursor = self._cursors.get(stage.branch, ("", {}))
        cursor = dict(cursor) if cursor_stage == stage.name else {}
        batches = []
        for _ in range(stage.grad_accum_steps):
            kind = self._kind(stage, cursor)
            batches.append(next(self._dataloader(stage, kind, cursor.get(kind))))
            cursor[kind] = batches[-1].state
        self._cursors[stage.branch] = (stage.name, cursor)
        return batches

    @staticmethod
    def _kind(stage: StageConfig, cursor: dict[str, Any]) -> str:
        """Whether the stage's next micro-batch has speech or text, on all ranks alike; counts it.

        Text comes as evenly as its share allows.
        """
        if not stage.text_share:
            return SPEECH
        done = cursor.get("batches", 0)
        cursor["batches"] = done + 1
        share = stage.text_share
        return TEXT if int((done + 1) * share + 1e-9) > int(done * share + 1e-9) else SPEECH

    def _dataloader(
        self, stage: StageConfig, kind: str, state: dict | None
    ) -> StreamingDataLoader | TextDataLoader:
        open_stage, dataloaders = self._open.get(stage.branch, ("", {}))
        if open_stage != stage.name:
            self.close(stage.branch)
            dataloaders = {}
            self._open[stage.branch] = (stage.name, dataloaders)
        if kind not in dataloaders:
            build = {
                SPEECH: self._builder.train_dataloader,
                TEXT: self._builder.text_dataloader,
            }[kind]
            dataloaders[kind] = build(stage, state)
        return dataloaders[kind]

    def state(self) -> dict[str, Any]:
        """Plain values for `load`: each branch's stage and the states after its last batches."""
        return {
            k: {"stage": name, SPEECH: None, **cursor}
            for k, (name, cursor) in self._cursors.items()
        }

    def load(self, state: dict[str, Any]) -> None:
        self._cursors = {
            k: (v["stage"], {n: x for n, x in v.items() if n != "stage" and x is not None})
            for k, v in state.items()
        }

    def close(self, *branches: str) -> None:
        """Close the dataloaders of ``branches``; all of them, if none is named."""
        for branch in branches or tuple(self._open):
            _, dataloaders = self._open.pop(branch, ("", {}))
            if SPEECH in dataloaders:
                dataloaders[SPEECH].close()
