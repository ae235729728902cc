"""SnapshotStore: encoders published by the pretrain branch, and DriftTrigger: when to publish.

A store is a folder on any file system that ranks or jobs share. A snapshot is a folder of fragments
(`tensor_fragments`) that appears by rename: readers never meet a torn one. Nothing in the store is
locked: one publisher claims it by creating a file, readers say what they use by files of their own,
and life is told by a counter that the publisher raises, never by comparing clocks.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import time
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dsasr.checkpoint import tensor_fragments, zero_partition
from dsasr.checkpoint.tensor_fragments import FragmentError, FragmentReader
from dsasr.stages import Snapshot
from dsasr.utils import distributed
from dsasr.utils.errors import UserError
from dsasr.utils.io import atomic_write, fsync_file

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
        self._token: str | None = None
        self._seen: tuple[str, float] = ("", time.monotonic())

    # -- publishing ------------------------------------------------------------------------------

    def claim(self, run: str) -> None:
        """Make ``run`` the store's one publisher; `UserError` on all ranks when another run is.

        The same run may claim again, as it does after a resume. Where a job of that run still
        lives, it finds the newer claim at its next `beat` or `publish`, and stops.
        """
        try:
            problem = distributed.on_main_rank(lambda: self._claim(run))
        except OSError as error:
            problem = f"{self.folder} cannot be written: {error}"
        if problem:
            raise UserError(problem)

    def _claim(self, run: str) -> str | None:
        """Why ``run`` cannot be the publisher, or None: it is now."""
        self._token = f"{os.getpid()} {uuid.uuid4().hex}"
        self.folder.mkdir(parents=True, exist_ok=True)
        # Written whole under a name of its own, then linked, which never takes another's place:
        # whoever reads the file knows the publisher.
        own = self.folder / f".{OWNER}.{self._token.split()[1]}.tmp"
        own.write_text(json.dumps({"run": run, "token": self._token}), encoding="utf-8")
        fsync_file(own)
        try:
            os.link(own, self.folder / OWNER)
        except FileExistsError:
            owner = self._owner().get("run", "of which nothing can be read")
            if owner != run:
                return (
                    f"{self.folder} has a publisher already ({owner}): give each pretrain run "
                    f"its own store, or delete {self.folder / OWNER} if that run is gone"
                )
            os.replace(own, self.folder / OWNER)
        finally:
            own.unlink(missing_ok=True)
        self._clean()
        return None

    def _owner(self) -> dict[str, str]:
        try:
            held = json.loads((self.folder / OWNER).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return held if isinstance(held, dict) else {}

    def _check_claim(self) -> None:
        """Raise `UserError` on all ranks when another job has claimed the store; collective."""
        lost = None
        if distributed.is_main_rank() and self._token is not None:
            token = self._owner().get("token")
            lost = token if token != self._token else None
        lost = distributed.broadcast(lost)
        if lost:
            raise UserError(
                f"{self.folder} was claimed by another job of this run (process "
                f"{lost.split()[0]}): this one stops; let only one of them run"
            )

    def _clean(self) -> None:
        """Remove what a killed publisher left half-written."""
        for path in self.folder.glob(".*.tmp"):
            if path.name.startswith((f".{IN_USE}", f".{OWNER}")):
                continue  # a reader's or another claimant's, which may be writing it just now
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(
                missing_ok=True
            )

    def publish(
        self, module: torch.nn.Module, masters: dict, snapshot: Snapshot, info: dict[str, Any]
    ) -> bool:
        """Publish ``module``'s encoder and CTC head, whole or not at all; collective.

        Returns False, and publishes nothing, when a weight is not finite. ``masters`` are fp32
        pieces to store beside low-precision weights. One that is there already, bit for bit, is
        left as it is: a resumed run comes by again. Raises `OSError` on a full disk, and
        `UserError` when the store was claimed by another job.
        """
        self._check_claim()
        held = zero_partition.weights(module) | masters
        if distributed.any_rank(not tensor_fragments.all_finite(f.tensor for f in held.values())):
            return False
        encoder = {k: f for k, f in held.items() if k.startswith("encoder.")}
        entry = {
            "kind": "snapshot",
            "id": snapshot.id,
            "pretrain": snapshot.pretrain,
            "cause": snapshot.cause,
            "checksum": tensor_fragments.checksum(encoder),
            **info,
        }
        if not distributed.broadcast(self._holds(entry)):
            tensor_fragments.write_folder(self.folder / snapshot.id, held, entry)
        return True

    def _holds(self, entry: dict[str, Any]) -> bool:
        try:
            there = tensor_fragments.read_manifest(self.folder / entry["id"])
        except FragmentError:
            return False
        same = ("checksum", "cause", "config")
        return bool(there["files"]) and all(there.get(k) == entry.get(k) for k in same)

    def beat(self) -> None:
        """Tell readers that the publisher lives. Counts up: no clock is compared. Collective."""
        self._check_claim()
        self._beats += 1
        if distributed.is_main_rank():
            with contextlib.suppress(OSError):  # a full disk is told when something is lost by it
                atomic_write(self.folder / HEARTBEAT, f"{os.getpid()} {self._beats}")

    def prune(self, needed: Iterable[str] = ()) -> list[str]:
        """Remove all but the newest ``keep`` snapshots, those in use and those ``needed``; rank 0.

        Never pruned: the newest one, its reference, and the final encoder. Returns what went.
        """
        listed, kept = [], set(needed) | set(self.in_use().values())
        for manifest in self.manifests():
            listed.append(manifest["id"])
            if manifest["cause"] == "final":
                kept.add(manifest["id"])
        if listed:
            kept |= {listed[-1], manifest.get("reference")}
        gone = [i for i in listed[: max(len(listed) - self.keep, 0)] if i not in kept]
        for name in gone:
            # Renamed first: a reader sees a whole snapshot or none.
            hidden = self.folder / f".{name}.gone.tmp"
            with contextlib.suppress(OSError):  # tried again after the next one is published
                os.rename(self.folder / name, hidden)
            shutil.rmtree(hidden, ignore_errors=True)
        return [name for name in gone if not (self.folder / name).exists()]

    # -- reading ---------------------------------------------------------------------------------

    def manifests(self) -> list[dict[str, Any]]:
        """The manifests of all whole snapshots, oldest first; of a store out of reach, none."""
        found = []
        try:
            folders = [p for p in self.folder.iterdir() if p.is_dir() and p.name[0] != "."]
        except OSError:
            return []
        for path in folders:
            try:
                manifest = tensor_fragments.read_manifest(path)
            except FragmentError:
                continue  # pruned between listing and reading
            if manifest.get("kind") == "snapshot" and manifest["id"] == path.name:
                found.append(manifest)
        return sorted(found, key=lambda m: (m["pretrain"], m["id"]))

    def manifest(self, name: str) -> dict[str, Any]:
        """The manifest of snapshot ``name``; empty when it is gone."""
        try:
            return tensor_fragments.read_manifest(self.folder / name)
        except FragmentError:
            return {}

    def snapshots(self) -> list[Snapshot]:
        """All whole snapshots meant for the sft branch, oldest first (no bare references)."""
        return [
            Snapshot(m["id"], m["pretrain"], m["cause"])
            for m in self.manifests()
            if m["cause"] != "reference"
        ]

    def open(self, name: str, architecture: str | None = None) -> FragmentReader:
        """A reader of snapshot ``name``; rank 0 has verified its sha256 sums. Collective.

        Raises `FragmentError` on all ranks when it is gone or altered, or when its encoder is not
        of ``architecture`` (a `dsasr.config.fingerprint` of the encoder's settings).
        """

        def check() -> FragmentReader:
            folder = self.folder / name
            if distributed.is_main_rank():
                held = tensor_fragments.verify(folder).get("architecture")
                if architecture and held and held != architecture:
                    raise FragmentError(
                        f"{folder} is of another architecture: model.encoder is not this recipe's"
                    )
            return FragmentReader(folder)

        return zero_partition.agree(check)

    def use(self, run: str, name: str | None) -> None:
        """Say that ``run`` uses snapshot ``name`` (None: none), which is then never pruned.

        Collective; raises `OSError` on all ranks when that cannot be written.
        """
        path = self.folder / f"{IN_USE}{run}.json"
        distributed.on_main_rank(lambda: atomic_write(path, json.dumps({"id": name})))

    def in_use(self) -> dict[str, str]:
        """Run → the snapshot that it uses."""
        used = {}
        for path in sorted(self.folder.glob(f"{IN_USE}*.json")):
            try:
                held = json.loads(path.read_text(encoding="utf-8"))["id"]
            except (OSError, ValueError, KeyError):
                continue  # being replaced; its owner writes it whole
            if held is not None:
                used[path.stem.removeprefix(IN_USE)] = held
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
