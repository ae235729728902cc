"""A run's checkpoints: when to save one, which to keep ("Interrupted is uninterrupted").

A checkpoint is a folder of fragments: every branch's weights, fp32 masters and Adam moments,
partitioned as on the ranks that wrote it, and a manifest with progress, dataloader state, drift
state and the recipe. The randomness of a step derives from its batch, so no generator state has to
be saved. A job of any world size and ZeRO stage can read it (`dsasr.checkpoint.tensor_fragments`).

Training waits for a copy in host memory, not for the disk (`dsasr.checkpoint.async_writer`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsasr.checkpoint.async_writer import AsyncFolderWriter
from dsasr.checkpoint.locate import checkpoint_name, list_checkpoints, newest_whole
from dsasr.checkpoint.manifest import read_manifest
from dsasr.checkpoint.tensor_fragments import Fragment, FragmentError, FragmentReader
from dsasr.utils import distributed, ranges
from dsasr.utils.io import remove_folder, remove_temporaries
from dsasr.utils.ranges import NonNegativeFloat, NonNegativeInt, PositiveInt

EARLY = 0.1  # of an interval: what may be lost where a process ends in an evaluation


@dataclass(frozen=True)
class CheckpointConfig:
    # optimizer steps of both branches between two checkpoints; also saved before an evaluation if a
    # tenth of the interval has passed; 0: not by steps
    every_steps: NonNegativeInt = 0
    # minutes between two checkpoints; also saved before an evaluation if a tenth of the interval
    # has passed; 0: not by time
    every_minutes: NonNegativeFloat = 30.0
    keep: PositiveInt = 2  # newest checkpoints kept; at least 1
    keep_hours: NonNegativeFloat = 0.0  # also keep one checkpoint every keep_hours hours; 0: none
    keep_best: NonNegativeInt = 0  # also keep this many checkpoints with the lowest `best`; 0: none
    best: str = "wer"  # metric of the sft branch's evaluations that ranks checkpoints
    async_write: bool = True  # write while training goes on, from a copy in the host's memory

    def __post_init__(self) -> None:
        ranges.check(self)


@dataclass(frozen=True)
class SaveResult:
    """The outcome of a save: ``failure`` is None if the checkpoint at ``path`` was published."""

    path: Path
    steps: int
    seconds: float  # that writing took
    stall: float  # that training waited for it
    failure: str | None


class CheckpointManager:
    """Saves, lists and prunes the checkpoints of one run, in ``folder``."""

    def __init__(self, folder: Path, config: CheckpointConfig):
        self.folder = Path(folder)
        self.config = config
        self._saved_at = time.monotonic()
        self._writer: AsyncFolderWriter | None = None
        self._steps, self._stall, self._recorded = 0, 0.0, False  # of the save by `_writer`
        self._results: list[SaveResult] = []  # on rank 0: not yet returned by `finished_saves`
        self._times_and_scores: dict[str, tuple[float, float]] = {}  # by a checkpoint's name

    def due(self, steps: int) -> bool:
        """Whether to save after ``steps`` optimizer steps, by rank 0's clock; collective."""
        by_steps = self.config.every_steps and steps % self.config.every_steps == 0
        minutes = (time.monotonic() - self._saved_at) / 60
        by_time = bool(self.config.every_minutes) and minutes >= self.config.every_minutes
        if not self.config.every_minutes:
            return bool(by_steps)
        return bool(by_steps) or distributed.broadcast(by_time)

    def due_early(self, steps: int) -> bool:
        """Whether to save now rather than at the end of an interval, because what follows may end
        the process: `EARLY` of an interval has passed since the last save; collective."""
        every, minutes = self.config.every_steps, self.config.every_minutes
        by_steps = bool(every) and steps - self._steps >= EARLY * every
        by_time = bool(minutes) and time.monotonic() - self._saved_at >= EARLY * minutes * 60
        return distributed.broadcast(by_steps or by_time)

    def save(
        self,
        steps: int,
        fragments: Mapping[str, Fragment],
        state: Mapping[str, Any],
        score: float | None = None,
        wait: bool = True,
    ) -> Path:
        """Write the checkpoint after ``steps`` steps, then prune old ones; collective.

        ``state`` goes into its manifest; ``score``: the ``best`` metric at these steps, if it was
        evaluated. With ``wait`` the checkpoint is published on return, else `finished_saves`
        reports it later. Raises `OSError` on all ranks when it could not be written.
        """
        started = time.monotonic()
        self._finish_write()
        target = self.folder / checkpoint_name(steps)
        info = {"kind": "checkpoint", "steps": steps, "saved": time.time(), "score": score, **state}
        # Also after a failure: a full disk is tried again when the next one is due.
        self._saved_at = started
        if distributed.is_main_rank() and self.folder.is_dir():
            remove_temporaries(self.folder)
        try:
            self._writer = AsyncFolderWriter(target, fragments, info)
        except OSError as error:
            self._results.append(SaveResult(target, steps, 0.0, 0.0, str(error)))
            raise
        self._steps, self._recorded = steps, False
        self._stall = time.monotonic() - started
        if (wait or not self.config.async_write) and (failure := self._finish_write()):
            raise OSError(failure)
        return target

    def finished_saves(self) -> list[SaveResult]:
        """On rank 0: the saves that have ended since the last call; not collective."""
        if self._writer is not None and self._writer.done:
            self._record(self._writer.failure)
        results, self._results = self._results, []
        return results

    def _finish_write(self) -> str | None:
        """Wait for the write in progress; returns why it failed; collective."""
        if self._writer is None:
            return None
        started, failure = time.monotonic(), None
        try:
            self._writer.wait()
        except OSError as error:
            failure = str(error)
        self._stall += time.monotonic() - started
        self._record(failure)
        self._writer = None
        return failure

    def _record(self, failure: str | None) -> None:
        """On rank 0, once for each save: keep its result, and prune old checkpoints."""
        if self._recorded or not distributed.is_main_rank():
            return
        self._recorded, writer = True, self._writer
        self._results.append(
            SaveResult(writer.target, self._steps, writer.seconds, self._stall, failure)
        )
        if failure is None:
            self._prune()

    def close(self, seconds: float = 60.0) -> None:
        """Give the write in progress ``seconds`` to finish: for a rank's end, or after an error."""
        if self._writer is not None:
            self._writer.wait_alone(seconds)

    def list(self) -> list[Path]:
        """Published checkpoints, oldest first."""
        return list_checkpoints(self.folder)

    def newest(self) -> tuple[FragmentReader | None, list[str]]:
        """The newest checkpoint whose checksums match, and why newer ones do not; collective.

        Rank 0 verifies.
        """
        path, problems = None, []
        if distributed.is_main_rank():
            path, problems = newest_whole(self.folder)
        path, problems = distributed.broadcast((str(path) if path else None, problems))
        return (FragmentReader(Path(path)) if path else None), problems

    def _prune(self) -> None:
        paths = self.list()
        kept = kept_by(self.config, [self._time_and_score(path) for path in paths])
        for index, path in enumerate(paths):
            # What cannot be removed is tried again after the next save.
            if index not in kept and remove_folder(path):
                self._times_and_scores.pop(path.name, None)

    def _time_and_score(self, path: Path) -> tuple[float, float]:
        if path.name not in self._times_and_scores:
            try:
                manifest = read_manifest(path)
            except FragmentError:
                manifest = {}
            score = manifest.get("score")
            self._times_and_scores[path.name] = (
                float(manifest.get("saved") or 0.0), math.inf if score is None else float(score)
            )  # fmt: skip
        return self._times_and_scores[path.name]


def kept_by(config: CheckpointConfig, times_and_scores: Sequence[tuple[float, float]]) -> set[int]:
    """The indices of the checkpoints to keep, of those with these (time saved in seconds, score),
    oldest first; a score that was not evaluated is infinite. Pure."""
    count = len(times_and_scores)
    kept = set(range(count)[-config.keep :])
    if config.keep_hours:
        last = -math.inf
        for index, (saved, _) in enumerate(times_and_scores):
            if saved - last >= config.keep_hours * 3600:
                kept.add(index)
                last = saved
    scored = sorted(
        (score, -index) for index, (_, score) in enumerate(times_and_scores) if score < math.inf
    )
    kept |= {-index for _, index in scored[: config.keep_best]}
    return kept
