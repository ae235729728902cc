"""SnapshotStore: encoders published by the pretrain branch.

A store is a folder on any file system that ranks or jobs share. A snapshot is a folder of fragments
(`tensor_fragments`) that appears by rename, so that readers never see a torn one. Nothing in the
store is locked: one publisher claims it by creating a file, each reader records in a file of its
own which snapshot it uses, and the publisher's heartbeat is a counter, so that no clocks are
compared.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from dsasr.checkpoint import tensor_fragments, zero_partition
from dsasr.checkpoint.locate import open_verified_by_one
from dsasr.checkpoint.manifest import MANIFEST, read_manifest, require
from dsasr.checkpoint.tensor_fragments import FragmentError, FragmentReader
from dsasr.schedule import Snapshot
from dsasr.utils import distributed, ranges
from dsasr.utils.errors import UserError
from dsasr.utils.io import atomic_write, fsync_path, remove_folder, remove_temporaries
from dsasr.utils.ranges import PositiveFloat, PositiveInt

OWNER, HEARTBEAT, IN_USE = "PUBLISHER", "heartbeat", "in-use-"


@dataclass(frozen=True)
class SnapshotStoreConfig:
    """The snapshot store: where pretraining publishes encoders for the sft branch."""

    # folder of the snapshots, on a file system that both jobs see; empty: RUN/snapshots
    path: str = ""
    # newest snapshots kept; never removed: the final one, the reference, those in use
    keep: PositiveInt = 5
    # seconds between two polls of the store, and of each wait for a snapshot
    poll_seconds: PositiveFloat = 5.0
    # seconds without a sign of life of the pretrain job after which `late` applies
    silent_seconds: PositiveFloat = 600.0
    # an sft job without its next encoder: wait on, continue with the newest one as final, or stop
    late: Literal["wait", "continue", "stop"] = "wait"

    def __post_init__(self) -> None:
        ranges.check(self)


class SnapshotStore:
    """Encoder snapshots by id.

    Publishing is collective; listing and reading are open to any process.
    """

    def __init__(self, folder: Path | str, keep: int = 5):
        self.folder = Path(folder)
        self.keep = keep
        self._beats = 0
        self._token: str | None = None
        self._last_beat: tuple[str, float] = ("", time.monotonic())

    # -- publishing ------------------------------------------------------------------------------

    def claim(self, run: str) -> None:
        """Make ``run`` the store's only publisher; `UserError` on all ranks when another run is it.

        The same run may claim again, as it does after a resume. An older job of that run which is
        still alive finds the newer claim at its next `beat` or `publish`, and stops.
        """
        try:
            problem = distributed.on_main_rank(lambda: self._claim(run))
        except OSError as error:
            problem = f"{self.folder} cannot be written: {error}"
        if problem:
            raise UserError(problem)

    def _claim(self, run: str) -> str | None:
        """Claim the store; returns the reason why ``run`` cannot be its publisher, or None."""
        self._token = f"{os.getpid()} {uuid.uuid4().hex}"
        self.folder.mkdir(parents=True, exist_ok=True)
        # Written whole under a unique name, then linked, which fails where the file exists: readers
        # see one publisher's claim, and all of it.
        claim = self.folder / f".{OWNER}.{self._token.split()[1]}.tmp"
        claim.write_text(json.dumps({"run": run, "token": self._token}), encoding="utf-8")
        fsync_path(claim)
        try:
            os.link(claim, self.folder / OWNER)
        except FileExistsError:
            owner = self._owner().get("run", "unreadable")
            if owner != run:
                return (
                    f"{self.folder} has a publisher already ({owner}): give each pretrain run "
                    f"its own store, or delete {self.folder / OWNER} if that run is gone"
                )
            os.replace(claim, self.folder / OWNER)
        finally:
            claim.unlink(missing_ok=True)
        # A reader or another claimant may be writing these just now.
        remove_temporaries(self.folder, spare=(IN_USE, OWNER))
        return None

    def _owner(self) -> dict[str, str]:
        try:
            claim = json.loads((self.folder / OWNER).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return claim if isinstance(claim, dict) else {}

    def _check_claim(self) -> None:
        """Raise `UserError` on all ranks when another job has claimed the store; collective."""
        newer = None
        if distributed.is_main_rank() and self._token is not None:
            token = self._owner().get("token")
            newer = token if token != self._token else None
        newer = distributed.broadcast(newer)
        if newer:
            raise UserError(
                f"{self.folder} was claimed by another job of this run (process "
                f"{str(newer).split()[0]}): this one stops; let only one of them run"
            )

    def publish(
        self, module: torch.nn.Module, masters: dict, snapshot: Snapshot, info: dict[str, Any]
    ) -> bool:
        """Publish ``module``'s encoder and CTC head, whole or not at all; collective.

        Returns False, and publishes nothing, when a weight is not finite. ``masters``: fragments of
        the fp32 masters, to store beside low-precision weights. A snapshot that the store has
        already, bit for bit, is left as it is: a resumed run publishes it a second time. Raises
        `OSError` on a full disk, and `UserError` when the store was claimed by another job.
        """
        self._check_claim()
        fragments = zero_partition.weight_fragments(module) | masters
        finite = tensor_fragments.all_finite(f.tensor for f in fragments.values())
        if distributed.any_rank(not finite):
            return False
        encoder = {k: f for k, f in fragments.items() if k.startswith("encoder.")}
        entry = {
            "kind": "snapshot",
            "id": snapshot.id,
            "pretrain": snapshot.pretrain,
            "cause": snapshot.cause,
            "checksum": tensor_fragments.checksum(encoder),
            **info,
        }
        if not distributed.broadcast(self._has(entry)):
            tensor_fragments.write_folder(self.folder / snapshot.id, fragments, entry)
        return True

    def _has(self, entry: dict[str, Any]) -> bool:
        manifest = self.manifest(entry["id"])
        compared = ("checksum", "cause", "config")
        return bool(manifest.get("files")) and all(
            manifest.get(key) == entry.get(key) for key in compared
        )

    def beat(self) -> None:
        """Write the publisher's heartbeat, a counter; collective."""
        self._check_claim()
        self._beats += 1
        if distributed.is_main_rank():
            with contextlib.suppress(OSError):  # a full disk is reported when it loses a snapshot
                atomic_write(self.folder / HEARTBEAT, f"{os.getpid()} {self._beats}")

    def prune(self, needed: Iterable[str] = ()) -> list[str]:
        """Remove all but the newest ``keep`` snapshots, those in use and those ``needed``; rank 0.

        Never removed: the newest one, its reference, and the final encoder. Returns the ids that
        were removed; one that cannot be is tried again at the next call.
        """
        ids, kept = [], set(needed) | set(self.in_use().values())
        for manifest in self.manifests():
            ids.append(manifest["id"])
            if manifest["cause"] == "final":
                kept.add(manifest["id"])
        if ids:
            kept |= {ids[-1], manifest.get("reference")}
        old = [i for i in ids[: max(len(ids) - self.keep, 0)] if i not in kept]
        return [i for i in old if remove_folder(self.folder / i)]

    # -- reading ---------------------------------------------------------------------------------

    def manifests(self) -> list[dict[str, Any]]:
        """The manifests of all whole snapshots, oldest first; none if the store cannot be read."""
        return self.listing()[0]

    def listing(self) -> tuple[list[dict[str, Any]], dict[str, str]]:
        """`manifests`, and folder → why another one that has a manifest is no snapshot."""
        manifests, problems = [], {}
        try:
            folders = [p for p in self.folder.iterdir() if p.is_dir() and p.name[0] != "."]
        except OSError:
            return [], {}
        for path in folders:
            try:
                manifest = read_manifest(path)
                if manifest.get("kind") == "snapshot":
                    require(path, manifest, "id", "pretrain", "cause")
            except FragmentError as error:
                if (path / MANIFEST).exists():  # not pruned between listing and reading
                    problems[path.name] = str(error)
                continue
            if manifest.get("kind") != "snapshot":
                problems[path.name] = f"{path} is of kind {manifest.get('kind')!r}, not 'snapshot'"
            elif manifest["id"] != path.name:
                problems[path.name] = f"{path} is called {manifest['id']!r} in its manifest"
            else:
                manifests.append(manifest)
        return sorted(manifests, key=lambda m: (m["pretrain"], m["id"])), problems

    def manifest(self, name: str) -> dict[str, Any]:
        """The manifest of snapshot ``name``; empty when it was pruned."""
        try:
            return read_manifest(self.folder / name)
        except FragmentError:
            return {}

    def snapshots(self) -> list[Snapshot]:
        """All whole snapshots for the sft branch, oldest first: without drift references."""
        return as_snapshots(self.manifests())

    def open(self, name: str, architecture: str | None = None) -> FragmentReader:
        """A reader of snapshot ``name``, whose checksums rank 0 has verified; collective.

        Raises `FragmentError` on all ranks when it was pruned or altered, or when its encoder is
        not of ``architecture`` (a `dsasr.config.fingerprint` of the encoder's settings).
        """

        reader = open_verified_by_one(self.folder / name)
        published = reader.manifest.get("architecture")
        if architecture and published and published != architecture:
            raise FragmentError(
                f"{reader.folder} is of another architecture: model.encoder or model.encoder_lora "
                "is not this recipe's"
            )
        return reader

    def use(self, run: str, name: str | None) -> None:
        """Record that ``run`` uses snapshot ``name`` (None: none), which is then never pruned.

        Collective; raises `OSError` on all ranks when that cannot be written.
        """
        path = self.folder / f"{IN_USE}{run}.json"
        distributed.on_main_rank(lambda: atomic_write(path, json.dumps({"id": name})))

    def in_use(self) -> dict[str, str]:
        """Run → the snapshot that it uses."""
        used = {}
        for path in sorted(self.folder.glob(f"{IN_USE}*.json")):
            try:
                name = json.loads(path.read_text(encoding="utf-8"))["id"]
            except (OSError, ValueError, KeyError, TypeError):
                continue  # it was removed since the listing, or is not a store's
            if isinstance(name, str):
                used[path.stem.removeprefix(IN_USE)] = name
        return used

    def silent_for(self) -> float:
        """Seconds, by this process's own monotonic clock, since the heartbeat last changed."""
        try:
            beat = (self.folder / HEARTBEAT).read_text(encoding="utf-8")
        except (OSError, ValueError):
            beat = ""
        if beat != self._last_beat[0]:
            self._last_beat = (beat, time.monotonic())
        return time.monotonic() - self._last_beat[1]


def as_snapshots(manifests: Iterable[dict[str, Any]]) -> list[Snapshot]:
    """Those of `SnapshotStore.manifests` that the sft branch may load."""
    return [
        Snapshot(m["id"], m["pretrain"], m["cause"]) for m in manifests if m["cause"] != "reference"
    ]
