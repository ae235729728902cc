"""The exchange of encoders: when pretraining gives one away, and how the sft branch takes it.

In the order of the method: the live encoder's drift is measured, a drifted one is published to the
store, the sft branch finds it (at once in a colocated run, by a look at the store in a concurrent
one) and takes it by hot-swap, or refuses it and goes on as it is. What a run knows of encoders is
its `Progress`, so the methods here that change it return it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from dsasr import config
from dsasr.build import Builder
from dsasr.checkpoint.snapshot_store import DriftTrigger, SnapshotStore
from dsasr.checkpoint.tensor_fragments import (
    Fragment,
    FragmentError,
    FragmentReader,
    on_all_ranks,
)
from dsasr.checkpoint.zero_partition import MASTER
from dsasr.engine.branch_engine import BranchEngine
from dsasr.recipe import Recipe
from dsasr.stages import Progress, Snapshot, with_published
from dsasr.tracking.monitor import Monitor
from dsasr.training.drift import DriftMonitor
from dsasr.utils import distributed
from dsasr.utils.errors import UserError

GIVEN = "given"


class EncoderSwap:
    """A run's side of its `SnapshotStore`. Every public method is collective."""

    def __init__(self, recipe: Recipe, build: Builder, monitor: Monitor):
        self.recipe, self.build, self.monitor = recipe, build, monitor
        self.schedule = recipe.schedule()
        self.store = SnapshotStore(recipe.store_folder, recipe.store.keep)
        self.trigger = DriftTrigger(recipe.drift.threshold)
        self._identity = str(recipe.folder.resolve())
        self._architecture = config.fingerprint(config.to_plain(recipe.model.encoder))
        self._drift: DriftMonitor | None = None
        self._reference: str | None = None  # what drift is measured from
        self._refused: set[str] = set()
        self._polled = -math.inf
        self._waits_at = -1  # sft step at which a wait was last told
        self._last_nll: float | None = None  # of the sft branch's last line
        self._swapped_at: int | None = None  # sft step of a swap that no line has followed yet

    # -- start, resume -----------------------------------------------------------------------

    def claim(self, fresh: bool) -> None:
        """Become the store's publisher.

        A ``fresh`` start may find its own snapshots of an earlier attempt there, but no other
        recipe's: `UserError`.
        """
        self.store.claim(self._identity)
        own = self.recipe.encoder_fingerprint()
        held = distributed.broadcast(
            self.store.manifests() if fresh and distributed.is_main_rank() else []
        )
        if any(m.get("config") != own for m in held):
            raise UserError(
                f"{self.store.folder} holds encoders of another recipe: give store.path=FOLDER or "
                "run=FOLDER, or delete it"
            )

    def state(self) -> dict[str, Any]:
        """What a checkpoint's manifest keeps; `fragments` is the rest."""
        return {
            "reference": self._reference,
            "refused": sorted(self._refused),
            "drift_seconds": self._drift.seconds if self._drift is not None else 0.0,
            "last_nll": self._last_nll,
            "swapped_at": self._swapped_at,
        }

    def fragments(self) -> dict[str, Fragment]:
        return self._drift.fragments() if self._drift is not None else {}

    def load(self, reader: FragmentReader) -> None:
        """Go on from what `state` and `fragments` gave."""
        held = reader.manifest
        self._refused = set(held.get("refused", ()))
        in_use = held["progress"]["in_use"]
        if in_use not in (None, GIVEN):
            self._mark(in_use)
        self._reference = held["reference"]
        self._last_nll, self._swapped_at = held["last_nll"], held["swapped_at"]
        if self._reference is not None and self.recipe.branch != "sft":
            self._probe().load(reader)
            self._probe().seconds = held["drift_seconds"]

    # -- giving ------------------------------------------------------------------------------

    def drift_cause(
        self, branch: BranchEngine, progress: Progress, trained_seconds: float
    ) -> tuple[str | None, dict[str, Any]]:
        """Whether to publish ``branch``'s encoder after this pretrain step, and what was measured.

        ``trained_seconds`` is what the run's steps have taken, for drift's share of the time.
        """
        at = progress.pretrain
        cause, found = self.schedule.publishes_at(at), {}
        due = self.schedule.measures_at(at)
        if due == "reference":
            self._probe().take_reference(branch)
            self._reference = f"step-{at}"
            self.monitor.event("reference", pretrain=at, steps=progress.steps)
        elif due == "measure" and self._reference is not None:
            cka = self._measure(branch, progress, trained_seconds)
            found = {"cka": cka}
            if math.isnan(cka):
                self._tell_refused(progress, "CKA is not a number", pretrain=at)
            elif cause is None and self.trigger.fires(cka):
                cause = "drift"
        return cause, found

    def _measure(self, branch: BranchEngine, progress: Progress, trained_seconds: float) -> float:
        drift = self._probe().measure(branch)
        spent, threshold = self._probe().seconds, self.recipe.drift.threshold
        share = spent / (spent + trained_seconds)
        values = {"cka": drift.cka, "cka_threshold": threshold}
        values |= {f"cka_layer_{i}": value for i, value in enumerate(drift.layers)}
        values |= {"drift_seconds": drift.seconds, "drift_share": share}
        head = {"steps": progress.steps, "branch": "pretrain", "stage": "drift"}
        self.monitor.scalars(head, values)
        self.monitor.event(
            "drift",
            cka=drift.cka,
            threshold=threshold,
            pretrain=progress.pretrain,
            share_of_time=share,
            steps=progress.steps,
        )
        return drift.cka

    def _probe(self) -> DriftMonitor:
        if self._drift is None:
            probe = self.build.held_out("pretrain", self.recipe.drift.probe_utterances)
            self._drift = DriftMonitor(self.recipe.drift, probe)
        return self._drift

    def publish(
        self, branch: BranchEngine, progress: Progress, cause: str, found: Mapping[str, Any]
    ) -> Progress:
        """Publish ``branch``'s encoder for the sft branch; a drifted one becomes the reference."""
        at = progress.pretrain
        snapshot = Snapshot(f"encoder-{at:09d}", at, cause)
        if any(s.id == snapshot.id for s in progress.published):
            return progress
        info = {
            **found,
            "reference": self._reference,
            "parent": progress.published[-1].id if progress.published else None,
            "architecture": self._architecture,
            "config": self.recipe.encoder_fingerprint(),
        }
        masters = branch.masters("") if _low_precision(branch) else {}
        started = time.monotonic()
        try:
            done = self.store.publish(branch.module, masters, snapshot, info)
            problem = None if done else "a weight is not finite"
        except OSError as error:
            problem = str(error)
        if problem:
            self._tell_refused(progress, problem, snapshot=snapshot.id, pretrain=at)
            if cause == "final":
                raise UserError(
                    f"the final encoder could not be published: {problem}; mend that and start "
                    "again, which repeats the steps since the last checkpoint"
                )
            return progress
        progress = with_published(progress, [snapshot])
        if self._drift is not None and self.recipe.drift.mode == "cka":
            self._drift.take_reference(branch)
            self._reference = snapshot.id
        if distributed.is_main_rank():
            self.store.prune(s.id for s in progress.published[-2:])
        self.monitor.event(
            "published",
            snapshot=snapshot.id,
            cause=cause,
            pretrain=at,
            steps=progress.steps,
            publish_seconds=time.monotonic() - started,
            **found,
        )
        return progress

    # -- finding -----------------------------------------------------------------------------

    def poll(self, progress: Progress) -> Progress:
        """Look for new snapshots of the other job; rank 0 decides what all ranks see."""
        now = time.monotonic()
        if not distributed.broadcast(now - self._polled >= self.recipe.store.poll_seconds):
            return progress
        self._polled = now
        found = self.store.snapshots() if distributed.is_main_rank() else []
        found = [s for s in distributed.broadcast(found) if s.id not in self._refused]
        return with_published(progress, found)

    def late(self, progress: Progress) -> Progress:
        """Nothing can step before the publisher has moved on; the recipe says how long to wait.

        The same progress: wait. Another one: go on with the last encoder as if it were final.
        `UserError`: give up.
        """
        if self.recipe.branch == "both":
            raise UserError("pretraining is over, but the next encoder was not published")
        late = self.recipe.store.late
        silent = distributed.broadcast(self.store.silent_for())
        if self._waits_at != progress.sft:
            self._waits_at = progress.sft
            self.monitor.event("waiting", sft=progress.sft, steps=progress.steps, late=late)
        if silent <= self.recipe.store.silent_seconds or late == "wait":
            return progress
        usable = progress.published
        if late == "stop" or not usable:
            raise UserError(
                f"{self.store.folder}: its publisher has been silent for {silent:.0f} s"
            )
        last = usable[-1]
        self.monitor.event("publisher_lost", silent_seconds=silent, last=last.id)
        return replace(progress, published=(*usable[:-1], replace(last, cause="final")))

    # -- taking ------------------------------------------------------------------------------

    def swap(
        self,
        progress: Progress,
        snapshot: Snapshot,
        branch: BranchEngine,
        live: BranchEngine | None,
    ) -> tuple[Progress, bool]:
        """Put ``snapshot`` into ``branch``: from the live branch if that is it, else the store.

        False, with progress that no longer knows of it, when it was refused; the branch is then as
        it was, and the log says why. There is no going on without the final one: `UserError`.
        """
        started = time.monotonic()
        if snapshot.id == GIVEN:
            self._load_given(branch)
        elif live is not None and snapshot.pretrain == progress.pretrain:
            self._mark(snapshot.id)
            branch.load_encoder(live)
        else:
            self._mark(snapshot.id)  # from here on it is not pruned
            try:
                branch.load_encoder(self.store.open(snapshot.id, self._architecture))
            except FragmentError as error:
                self._mark(progress.in_use)
                return self._refuse(progress, snapshot, str(error)), False
        seconds = time.monotonic() - started
        self.monitor.event(
            "swap",
            snapshot=snapshot.id,
            cause=snapshot.cause,
            stage=branch.stage.name,
            pretrain=snapshot.pretrain,
            sft=progress.sft,
            steps=progress.steps,
            swap_seconds=seconds,
            checksum=self._check(branch, snapshot),
            nll_before=self._last_nll,
        )
        self._swapped_at = progress.sft
        self._encoder_scalars(progress, swap_seconds=seconds, in_use=float(snapshot.pretrain))
        # A point on the threshold's line, beside the curve of CKA.
        mark = {"swap_mark": self.recipe.drift.threshold}
        self.monitor.scalars({"steps": progress.steps, "branch": "sft", "stage": "drift"}, mark)
        self.monitor.text("encoder", f"{snapshot.id} ({snapshot.cause})", progress.steps)
        return progress, True

    def _check(self, branch: BranchEngine, snapshot: Snapshot) -> str | None:
        """The checksum of the branch's encoder over all ranks: the snapshot's, or it stops."""
        if snapshot.id == GIVEN:
            return None
        manifest = distributed.broadcast(
            self.store.manifest(snapshot.id) if distributed.is_main_rank() else {}
        )
        found = branch.checksum()
        if manifest.get("checksum") not in (None, found):
            raise RuntimeError(
                f"{snapshot.id} was loaded wrongly: checksum {found}, not {manifest['checksum']}"
            )
        return found

    def _mark(self, name: str | None) -> None:
        """Say in the store that ``name`` is in use.

        A store that cannot be written may still be read, so that stops no swap.
        """
        try:
            self.store.use(_file_name(self._identity), name)
        except OSError as error:
            self.monitor.event("not_marked", snapshot=name, reason=str(error))

    def _tell_refused(self, progress: Progress, reason: str, **more: Any) -> None:
        self.monitor.event("refused", reason=reason, steps=progress.steps, **more)

    def _refuse(self, progress: Progress, snapshot: Snapshot, reason: str) -> Progress:
        self._tell_refused(progress, reason, snapshot=snapshot.id, sft=progress.sft)
        if snapshot.cause == "final":
            raise UserError(f"the final encoder cannot be used: {reason}")
        self._refused.add(snapshot.id)
        rest = tuple(s for s in progress.published if s.id != snapshot.id)
        return replace(progress, published=rest)

    def _load_given(self, branch: BranchEngine) -> None:
        folder = Path(self.recipe.model.encoder_from)
        try:
            branch.load_encoder(on_all_ranks(lambda: FragmentReader(folder)))
        except FragmentError as error:
            raise UserError(f"model.encoder_from: {error}") from None

    def _encoder_scalars(self, progress: Progress, **values: float) -> None:
        head = {"steps": progress.steps, "branch": "sft", "stage": "encoder"}
        self.monitor.scalars(head, values)

    def line(self, nll: float, progress: Progress) -> None:
        """Keep the sft branch's loss of a line; the first after a swap tells what that changed."""
        if self._swapped_at is not None:
            self.monitor.event(
                "after_swap",
                nll_before=self._last_nll,
                nll=nll,
                steps=progress.steps,
                sft_steps=progress.sft - self._swapped_at,
            )
            if self._last_nll is not None:
                self._encoder_scalars(progress, nll_before=self._last_nll, nll_after=nll)
            self._swapped_at = None
        self._last_nll = nll


def _low_precision(branch: BranchEngine) -> bool:
    weight = next(branch.module.parameters())
    return any(
        key.startswith(f"{MASTER}/") and fragment.tensor.dtype != weight.dtype
        for key, fragment in branch.masters("").items()
    )


def _file_name(text: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in text).strip("-")[-80:]
