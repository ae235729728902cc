"""Save and resume everything that a run is: law 2, *interrupted is uninterrupted*.

A checkpoint is a folder of fragments: every branch's weights, fp32 masters and Adam moments, cut as
the ranks held them, plus a manifest with progress, stream cursors, drift state and the recipe. The
randomness of a step derives from its batch, so no generator state has to be kept. Any world size
and any ZeRO stage can read it (`dsasr.checkpoint.tensor_fragments`).

Training waits for a copy in memory, not for the disk (`dsasr.checkpoint.async_writer`).
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsasr.checkpoint import tensor_fragments
from dsasr.checkpoint.async_writer import AsyncFolderWriter, remove_remains
from dsasr.checkpoint.tensor_fragments import Fragment, FragmentError, FragmentReader
from dsasr.utils import distributed
from dsasr.utils.errors import UserError


@dataclass(frozen=True)
class CheckpointConfig:
    every_steps: int = 0  # optimizer steps over both branches; 0: not by steps
    every_minutes: float = 30.0  # 0: not by time
    keep: int = 2  # newest ones kept
    keep_hours: float = 0.0  # also kept: one for each so many hours; 0: none
    keep_best: int = 0  # also kept: so many with the lowest ``best`` of an evaluation
    best: str = "wer"  # a metric of the sft branch's evaluations
    async_write: bool = True  # write while training goes on; takes a copy in the host's memory

    def __post_init__(self) -> None:
        if self.keep < 1:
            raise UserError("checkpoint.keep must be at least 1: resuming needs one")
        if self.keep_hours < 0 or self.keep_best < 0:
            raise UserError("checkpoint: keep_hours and keep_best must be at least 0")


@dataclass(frozen=True)
class SaveResult:
    """What became of a checkpoint: ``failure`` is None if it is there."""

    path: Path
    steps: int
    seconds: float  # that writing took
    stall: float  # that training waited for it
    failure: str | None


class CheckpointManager:
    """The checkpoints of one run, in ``folder``."""

    def __init__(self, folder: Path, config: CheckpointConfig):
        self.folder = Path(folder)
        self.config = config
        self._saved_at = time.monotonic()
        self._write: AsyncFolderWriter | None = None
        self._steps, self._stall, self._told = 0, 0.0, False
        self._landed: list[SaveResult] = []  # on rank 0: not yet asked for
        self._marks: dict[str, tuple[float, float]] = {}  # of a checkpoint: (saved, score)

    def due(self, steps: int) -> bool:
        """Whether to save after ``steps`` optimizer steps, by rank 0's clock; collective."""
        by_steps = self.config.every_steps and steps % self.config.every_steps == 0
        minutes = (time.monotonic() - self._saved_at) / 60
        by_time = bool(self.config.every_minutes) and minutes >= self.config.every_minutes
        if not self.config.every_minutes:
            return bool(by_steps)
        return bool(by_steps) or distributed.broadcast(by_time)

    def save(
        self,
        steps: int,
        held: Mapping[str, Fragment],
        state: Mapping[str, Any],
        score: float | None = None,
        wait: bool = True,
    ) -> Path:
        """Write the checkpoint after ``steps`` steps, then drop old ones; collective.

        With ``wait`` it is there on return, else `finished_saves` tells when it is. Raises `OSError` on all
        ranks when it could not be written.
        """
        started = time.monotonic()
        self._settle()
        target = self.folder / f"step-{steps:010d}"
        info = {"kind": "checkpoint", "steps": steps, "saved": time.time(), "score": score, **state}
        # Also after a failure: a full disk is tried again when the next one is due.
        self._saved_at = started
        if distributed.is_main_rank() and self.folder.is_dir():
            remove_remains(self.folder)
        try:
            self._write = AsyncFolderWriter(target, held, info)
        except OSError as error:
            self._landed.append(SaveResult(target, steps, 0.0, 0.0, str(error)))
            raise
        self._steps, self._told = steps, False
        self._stall = time.monotonic() - started
        if (wait or not self.config.async_write) and (failure := self._settle()):
            raise OSError(failure)
        return target

    def finished_saves(self) -> list[SaveResult]:
        """On rank 0: what has become of checkpoints since the last call; not collective."""
        if self._write is not None and self._write.over:
            self._land(self._write.failure)
        found, self._landed = self._landed, []
        return found

    def _settle(self) -> str | None:
        """Wait for the one that is being written; why it failed; collective."""
        if self._write is None:
            return None
        started, failure = time.monotonic(), None
        try:
            self._write.wait()
        except OSError as error:
            failure = str(error)
        self._stall += time.monotonic() - started
        self._land(failure)
        self._write = None
        return failure

    def _land(self, failure: str | None) -> None:
        """Note on rank 0, once, what has become of a checkpoint, and drop old ones."""
        if self._told or not distributed.is_main_rank():
            return
        self._told, write = True, self._write
        self._landed.append(
            SaveResult(write.target, self._steps, write.seconds, self._stall, failure)
        )
        if failure is None:
            self._prune()

    def close(self, seconds: float = 60.0) -> None:
        """At a rank's end, also a bad one: let what is being written come through."""
        if self._write is not None:
            self._write.wait_alone(seconds)

    # -- what is there -----------------------------------------------------------------------

    def list(self) -> list[Path]:
        """Published checkpoints, oldest first."""
        return sorted(self.folder.glob("step-*")) if self.folder.is_dir() else []

    def newest(self) -> tuple[FragmentReader | None, list[str]]:
        """The newest checkpoint whose checksums hold, and why not a newer one; collective."""
        chosen, passed_over = None, []
        if distributed.is_main_rank():
            for path in reversed(self.list()):
                try:
                    tensor_fragments.verify(path)
                    chosen = str(path)
                    break
                except FragmentError as error:
                    passed_over.append(str(error))
        chosen, passed_over = distributed.broadcast((chosen, passed_over))
        return (FragmentReader(Path(chosen)) if chosen else None), passed_over

    def _prune(self) -> None:
        paths = self.list()
        marks = [self._mark(path) for path in paths]
        kept = kept_by(self.config, marks)
        for place, path in enumerate(paths):
            if place not in kept:
                # Renamed first: a reader sees a whole one or none.
                hidden = path.parent / f".{path.name}.gone.tmp"
                try:
                    path.rename(hidden)
                except OSError:
                    continue  # tried again after the next one
                shutil.rmtree(hidden, ignore_errors=True)
                self._marks.pop(path.name, None)

    def _mark(self, path: Path) -> tuple[float, float]:
        if path.name not in self._marks:
            try:
                held = tensor_fragments.read_manifest(path)
            except FragmentError:
                held = {}
            score = held.get("score")
            self._marks[path.name] = (
                float(held.get("saved", 0.0)), math.inf if score is None else float(score)
            )  # fmt: skip
        return self._marks[path.name]


def kept_by(config: CheckpointConfig, marks: Sequence[tuple[float, float]]) -> set[int]:
    """Which of the checkpoints with these marks (saved at, score), oldest first, to keep. Pure."""
    kept = set(range(len(marks))[-config.keep :])
    if config.keep_hours:
        last = -math.inf
        for place, (saved, _) in enumerate(marks):
            if saved - last >= config.keep_hours * 3600:
                kept.add(place)
                last = saved
    scored = sorted((score, -place) for place, (_, score) in enumerate(marks) if score < math.inf)
    kept |= {-place for _, place in scored[: config.keep_best]}
    return kept
