"""SnapshotStore: encoders published by the pretrain branch, and DriftTrigger: when to publish.

A store is a folder on any file system that ranks or jobs share. A snapshot is a folder of fragments
(`dsasr.fragments`) that appears by rename, so a reader never meets a torn one. Nothing in the store
is locked: one publisher claims it by creating a file, readers say what they use by files of their
own, and life is told by a counter that the publisher raises, never by comparing clocks.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dsasr import fragments, partition, ranks
from dsasr.errors import UserError
from dsasr.files import atomic_write
from dsasr.fragments import FragmentError, FragmentReader
from dsasr.stages import Snapshot

OWNER, HEARTBEAT, IN_USE = "PUBLISHER", "heartbeat", "in-use-"


@dataclass(frozen=True)
class DriftTrigger:
    """Fires when the encoder has drifted from its reference. Pure: values in, decisions out."""

    threshold: float

    def fires(self, cka: float) -> bool:
        """Whether this value publishes a snapshot. Not a number is an error, never a trigger."""
        if math.isnan(cka):
            raise ValueError("CKA is not a number: the encoder's features are not finite")
        return cka < self.threshold

    def decide(self, values: Iterable[float]) -> list[bool]:
        """One decision a value; each value is relative to the reference that then held."""
        return [self.fires(v) for v in values]


class SnapshotStore:
    """Encoders by id. Publishing is collective; listing and reading are for anyone."""

    def __init__(self, folder: Path | str, keep: int = 5):
        self.folder = Path(folder)
        self.keep = keep
        self._beats = 0
        self._seen: tuple[str, float] = ("", time.monotonic())

    # -- publishing ------------------------------------------------------------------------------

    def claim(self, run: str) -> None:
        """Make ``run`` the store's one publisher; `UserError` when another run is.

        The same run may claim again, as it does after a resume.
        """
        problem = None
        if ranks.main_rank():
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                with open(self.folder / OWNER, "x", encoding="utf-8") as file:
                    file.write(run)
            except FileExistsError:
                owner = (self.folder / OWNER).read_text(encoding="utf-8")
                if owner != run:
                    problem = (
                        f"{self.folder} has a publisher already ({owner}): give each pretrain run "
                        f"its own store, or delete {self.folder / OWNER} if that run is gone"
                    )
            self._clean()
        problem = ranks.broadcast(problem)
        if problem:
            raise UserError(problem)

    def _clean(self) -> None:
        """Remove what a killed publisher left half-written."""
        for path in self.folder.glob(".*.tmp"):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()

    def publish(
        self, module: torch.nn.Module, masters: dict, snapshot: Snapshot, info: dict[str, Any]
    ) -> bool:
        """Publish ``module``'s encoder and CTC head, whole or not at all; collective.

        Returns False, and publishes nothing, when a weight is not finite. ``masters`` are fp32
        pieces to store beside low-precision weights. Raises `OSError` on a full disk.
        """
        held = partition.weights(module) | masters
        finite = all(
            bool(torch.isfinite(f.tensor).all())
            for f in held.values()
            if f.tensor.is_floating_point()
        )
        if ranks.any_rank(not finite):
            return False
        entry = {
            "kind": "snapshot",
            "id": snapshot.id,
            "pretrain": snapshot.pretrain,
            "cause": snapshot.cause,
            **info,
        }
        fragments.write_folder(self.folder / snapshot.id, held, entry)
        return True

    def beat(self) -> None:
        """Tell readers that the publisher lives."""
        self._beats += 1
        if ranks.main_rank():
            atomic_write(self.folder / HEARTBEAT, f"{os.getpid()} {self._beats}")

    def prune(self, needed: Iterable[str] = ()) -> list[str]:
        """Remove all but the newest ``keep`` snapshots, those in use and those ``needed``; rank 0."""
        kept = set(needed) | self._in_use()
        listed = [m["id"] for m in self.manifests()]
        gone = [i for i in listed[: max(len(listed) - self.keep, 0)] if i not in kept]
        for name in gone:
            # Renamed first: a reader sees a whole snapshot or none.
            hidden = self.folder / f".{name}.gone.tmp"
            os.rename(self.folder / name, hidden)
            shutil.rmtree(hidden, ignore_errors=True)
        return gone

    # -- reading ---------------------------------------------------------------------------------

    def manifests(self) -> list[dict[str, Any]]:
        """The manifests of all whole snapshots, oldest first."""
        found = []
        if self.folder.is_dir():
            for path in self.folder.iterdir():
                if path.is_dir() and not path.name.startswith("."):
                    try:
                        found.append(fragments.read_manifest(path))
                    except FragmentError:
                        continue  # pruned between listing and reading
        return sorted(found, key=lambda m: (m["pretrain"], m["id"]))

    def snapshots(self) -> list[Snapshot]:
        """All whole snapshots meant for the sft branch, oldest first (no bare references)."""
        return [
            Snapshot(m["id"], m["pretrain"], m["cause"])
            for m in self.manifests()
            if m["cause"] != "reference"
        ]

    def open(self, name: str, verify: bool = True) -> FragmentReader:
        """A reader of snapshot ``name``, after its checksums were verified by rank 0; collective."""
        folder, problem = self.folder / name, None
        if verify and ranks.main_rank():
            try:
                fragments.verify(folder)
            except FragmentError as error:
                problem = str(error)
        problem = ranks.broadcast(problem)
        if problem:
            raise FragmentError(problem)
        return FragmentReader(folder)

    def use(self, run: str, name: str | None) -> None:
        """Say that ``run`` uses snapshot ``name``, which is then never pruned."""
        if ranks.main_rank():
            self.folder.mkdir(parents=True, exist_ok=True)
            atomic_write(self.folder / f"{IN_USE}{run}.json", json.dumps({"id": name}))

    def _in_use(self) -> set[str]:
        used = set()
        for path in self.folder.glob(f"{IN_USE}*.json"):
            try:
                used.add(json.loads(path.read_text(encoding="utf-8"))["id"])
            except (OSError, ValueError, KeyError):
                continue  # being replaced; its owner writes it whole
        return used

    def silent_for(self) -> float:
        """Seconds, by this process's own monotonic clock, since the heartbeat last changed."""
        try:
            beat = (self.folder / HEARTBEAT).read_text(encoding="utf-8")
        except OSError:
            beat = ""
        if beat != self._seen[0]:
            self._seen = (beat, time.monotonic())
        return time.monotonic() - self._seen[1]
