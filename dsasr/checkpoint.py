"""Save and resume everything that a run is: law 2, *interrupted is uninterrupted*.

A checkpoint is a folder of fragments: every branch's weights, fp32 masters and Adam moments, cut as
the ranks held them, plus a manifest with progress, stream cursors, drift state and the recipe. The
randomness of a step derives from its batch, so no generator state has to be kept. Any world size
and any ZeRO stage can read it (`dsasr.fragments`).
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsasr import fragments, ranks
from dsasr.errors import UserError
from dsasr.fragments import Fragment, FragmentError, FragmentReader


@dataclass(frozen=True)
class CheckpointConfig:
    every_steps: int = 0  # optimizer steps over both branches; 0: not by steps
    every_minutes: float = 30.0  # 0: not by time
    keep: int = 2  # newest ones kept

    def __post_init__(self) -> None:
        if self.keep < 1:
            raise UserError("checkpoint.keep must be at least 1: resuming needs one")


class Checkpoints:
    """The checkpoints of one run, in ``folder``."""

    def __init__(self, folder: Path, config: CheckpointConfig):
        self.folder = Path(folder)
        self.config = config
        self._saved_at = time.monotonic()

    def due(self, steps: int) -> bool:
        """Whether to save after ``steps`` optimizer steps, by rank 0's clock; collective."""
        by_steps = self.config.every_steps and steps % self.config.every_steps == 0
        minutes = (time.monotonic() - self._saved_at) / 60
        by_time = bool(self.config.every_minutes) and minutes >= self.config.every_minutes
        if not self.config.every_minutes:
            return bool(by_steps)
        return bool(by_steps) or ranks.broadcast(by_time)

    def save(self, steps: int, held: Mapping[str, Fragment], state: Mapping[str, Any]) -> Path:
        """Write the checkpoint after ``steps`` steps, then drop old ones; collective."""
        target = self.folder / f"step-{steps:010d}"
        try:
            fragments.write_folder(target, held, {"kind": "checkpoint", "steps": steps, **state})
        finally:
            # Also after a failure: a full disk is tried again when the next one is due.
            self._saved_at = time.monotonic()
        if ranks.main_rank():
            for old in self.list()[: -self.config.keep]:
                shutil.rmtree(old, ignore_errors=True)
        return target

    def list(self) -> list[Path]:
        """Published checkpoints, oldest first."""
        return sorted(self.folder.glob("step-*")) if self.folder.is_dir() else []

    def newest(self) -> tuple[FragmentReader | None, list[str]]:
        """The newest checkpoint whose checksums hold, and why not a newer one; collective."""
        chosen, passed_over = None, []
        if ranks.main_rank():
            for path in reversed(self.list()):
                try:
                    fragments.verify(path)
                    chosen = str(path)
                    break
                except FragmentError as error:
                    passed_over.append(str(error))
        chosen, passed_over = ranks.broadcast((chosen, passed_over))
        return (FragmentReader(Path(chosen)) if chosen else None), passed_over
