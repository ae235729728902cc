"""Encoder hot-swap: drift measured, the encoder published, and loaded into the sft branch.

The live encoder's drift is measured; a drifted encoder is published to the snapshot store; the sft
branch finds it there (at once in a colocated run, by polling in a concurrent one) and loads it, or
refuses it and keeps the one in use. The snapshots of a run are part of its `Progress`, which the
methods here take and return.
"""

from __future__ import annotations

import math
import time
from collections import deque
from dataclasses import replace
from typing import Any

from dsasr import config
from dsasr.build import Builder
from dsasr.checkpoint.snapshot_store import SnapshotStore, as_snapshots
from dsasr.checkpoint.tensor_fragments import Fragment, FragmentError, FragmentReader
from dsasr.checkpoint.zero_partition import MASTER
from dsasr.engine.branch_engine import BranchEngine
from dsasr.recipe import Recipe
from dsasr.schedule import GIVEN, Progress, Snapshot, add_published
from dsasr.tracking.monitor import Monitor
from dsasr.training.drift import DriftMonitor, DriftTrigger
from dsasr.utils import distributed
from dsasr.utils.errors import UserError


class EncoderSwap:
    """Publishes to and loads from a run's `SnapshotStore`. Every public method is collective."""

    def __init__(self, recipe: Recipe, builder: Builder, monitor: Monitor):
        self.recipe, self.builder, self.monitor = recipe, builder, monitor
        self.schedule = recipe.schedule()
        self.store = SnapshotStore(recipe.store_folder, recipe.store.keep)
        self.trigger = DriftTrigger(recipe.drift.threshold)
        self._identity = str(recipe.folder.resolve())
        self._architecture = recipe.encoder_architecture()
        self._drift: DriftMonitor | None = None
        self._reference: str | None = None  # name of the encoder that drift is measured from
        # Snapshot ids that each of the last `keep` checkpoints, and one being written, would load
        # on resume.
        self._kept_for_resume: deque[set[str]] = deque(maxlen=recipe.checkpoint.keep + 1)
        self._refused: set[str] = set()
        self._unreadable: set[str] = set()  # subset of _refused: manifest unreadable
        self._polled_at = -math.inf
        self._waited_at = -1  # sft step of the last wait in the event log
        self._last_nll: float | None = None  # of the sft branch's last line of metrics
        self._swapped_at: int | None = None  # sft step of a swap without a line of metrics yet

    # -- start, resume -----------------------------------------------------------------------

    def claim(self, fresh: bool) -> None:
        """Become the store's publisher.

        Raises `UserError` where a ``fresh`` start finds snapshots of another recipe there; its own
        of an earlier attempt may be.
        """
        self.store.claim(self._identity)
        fingerprint = self.recipe.encoder_fingerprint()
        manifests = distributed.broadcast(
            self.store.manifests() if fresh and distributed.is_main_rank() else []
        )
        if any(m.get("config") != fingerprint for m in manifests):
            raise UserError(
                f"{self.store.folder} holds encoders of another recipe: give store.path=FOLDER or "
                "run=FOLDER, or delete it"
            )

    def state(self) -> dict[str, Any]:
        """The plain values for a checkpoint's manifest; its tensors are `fragments`."""
        return {
            "reference": self._reference,
            "refused": sorted(self._refused - self._unreadable),
            "drift_seconds": self._drift.seconds if self._drift is not None else 0.0,
            "last_nll": self._last_nll,
            "swapped_at": self._swapped_at,
        }

    def fragments(self) -> dict[str, Fragment]:
        """The drift reference's features, for a checkpoint."""
        return self._drift.fragments() if self._drift is not None else {}

    def load(self, reader: FragmentReader, progress: Progress) -> None:
        """Restore `state` and `fragments`, with the ``progress`` of the checkpoint."""
        self.keep_for_resume(progress)
        manifest = reader.manifest
        self._refused = set(manifest.get("refused", ()))
        in_use = manifest["progress"]["in_use"]
        if in_use not in (None, GIVEN):
            self._mark_in_use(in_use)
        self._reference = manifest["reference"]
        self._last_nll, self._swapped_at = manifest["last_nll"], manifest["swapped_at"]
        if self._reference is not None and self.recipe.branch != "sft":
            self._drift_monitor().load(reader)
            self._drift_monitor().seconds = manifest["drift_seconds"]

    def keep_for_resume(self, progress: Progress) -> None:
        """Keep what a run resumed from a checkpoint with this progress would load."""
        self._kept_for_resume.append(self.schedule.needed(progress))

    # -- drift and publication ---------------------------------------------------------------

    def check_drift(
        self, live: BranchEngine, progress: Progress, trained_seconds: float
    ) -> tuple[str | None, float | None]:
        """Measure drift if due after this pretrain step; returns (cause to publish, CKA measured).

        ``trained_seconds`` is the time that the run's steps have taken, for drift's share of it.
        """
        step = progress.pretrain
        cause, cka = self.schedule.publishes_at(step), None
        due = self.schedule.measures_at(step)
        if due == "reference":
            self._drift_monitor().take_reference(live)
            self._reference = f"step-{step}"
            self.monitor.event("reference", pretrain=step, steps=progress.steps)
        elif due == "measure" and self._reference is not None:
            cka = self._measure(live, progress, trained_seconds)
            if math.isnan(cka):
                self._log_refused(progress, "CKA is not a number", pretrain=step)
            elif cause is None and self.trigger.fires(cka):
                cause = "drift"
        return cause, cka

    def _measure(self, live: BranchEngine, progress: Progress, trained_seconds: float) -> float:
        drift = self._drift_monitor().measure(live)
        drift_seconds, threshold = self._drift_monitor().seconds, self.recipe.drift.threshold
        share = drift_seconds / (drift_seconds + trained_seconds)
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

    def _drift_monitor(self) -> DriftMonitor:
        if self._drift is None:
            utterances = self.recipe.drift.probe_utterances
            batches = self.builder.validation_batches("pretrain", utterances)
            self._drift = DriftMonitor(self.recipe.drift, batches)
        return self._drift

    def publish(
        self, live: BranchEngine, progress: Progress, cause: str, cka: float | None
    ) -> Progress:
        """Publish the live encoder for the sft branch; drift is then measured from it.

        Raises `UserError` where the final encoder cannot be published; another one that cannot is
        skipped, with an event.
        """
        step = progress.pretrain
        snapshot = Snapshot(f"encoder-{step:09d}", step, cause)
        measured = {} if cka is None else {"cka": cka}
        if any(s.id == snapshot.id for s in progress.published):
            return progress
        info = {
            **measured,
            "reference": self._reference,
            "parent": progress.published[-1].id if progress.published else None,
            "architecture": self._architecture,
            "encoder": config.to_plain(self.recipe.model.encoder),
            "vocabularies": self.builder.vocabularies,
            "config": self.recipe.encoder_fingerprint(),
            "encoder_lora": config.to_plain(self.recipe.model.encoder_lora),
        }
        masters = _more_precise(live)
        started = time.monotonic()
        try:
            published = self.store.publish(live.module, masters, snapshot, info)
            problem = None if published else "a weight is not finite"
        except OSError as error:
            problem = str(error)
        if problem:
            self._log_refused(progress, problem, snapshot=snapshot.id, pretrain=step)
            if cause == "final":
                raise UserError(
                    f"the final encoder could not be published: {problem}; fix that and start "
                    "again, which repeats the steps since the last checkpoint"
                )
            return progress
        progress = add_published(progress, [snapshot])
        if self._drift is not None and self.recipe.drift.mode == "cka":
            self._drift.take_reference(live)
            self._reference = snapshot.id
        if distributed.is_main_rank():
            needed = {s.id for s in progress.published[-2:]} | self.schedule.needed(progress)
            self.store.prune(needed.union(*self._kept_for_resume))
        self.monitor.event(
            "published",
            snapshot=snapshot.id,
            cause=cause,
            pretrain=step,
            steps=progress.steps,
            publish_seconds=time.monotonic() - started,
            **measured,
        )
        return progress

    # -- waiting for the other job -----------------------------------------------------------

    def poll(self, progress: Progress) -> Progress:
        """Find new snapshots of the other job; rank 0 decides what all ranks see."""
        now = time.monotonic()
        if not distributed.broadcast(now - self._polled_at >= self.recipe.store.poll_seconds):
            return progress
        self._polled_at = now
        manifests, problems = self.store.listing() if distributed.is_main_rank() else ([], {})
        snapshots, problems = distributed.broadcast((as_snapshots(manifests), problems))
        for name in sorted(problems.keys() - self._refused):
            self._log_refused(progress, problems[name], snapshot=name, sft=progress.sft)
        # One that is repaired, or published again, is read.
        self._refused = (self._refused - self._unreadable) | set(problems)
        self._unreadable = set(problems)
        return add_published(progress, [s for s in snapshots if s.id not in self._refused])

    def wait_or_give_up(self, progress: Progress) -> Progress:
        """While no step is possible: whether to wait for the publisher, by the recipe's store.late.

        Returns the same progress to wait, or another one that has the last encoder as the final
        one; raises `UserError` to stop.
        """
        if self.recipe.branch == "both":
            raise UserError("pretraining is over, but the next encoder was not published")
        late = self.recipe.store.late
        silent = distributed.broadcast(self.store.silent_for())
        if self._waited_at != progress.sft:
            self._waited_at = progress.sft
            self.monitor.event("waiting", sft=progress.sft, steps=progress.steps, late=late)
        if silent <= self.recipe.store.silent_seconds or late == "wait":
            return progress
        snapshots = progress.published
        if late == "stop" or not snapshots:
            raise UserError(
                f"{self.store.folder}: its publisher has been silent for {silent:.0f} s"
            )
        last = snapshots[-1]
        self.monitor.event("publisher_lost", silent_seconds=silent, last=last.id)
        return replace(progress, published=(*snapshots[:-1], replace(last, cause="final")))

    # -- hot-swap ----------------------------------------------------------------------------

    def swap(
        self,
        progress: Progress,
        snapshot: Snapshot,
        sft: BranchEngine,
        live: BranchEngine | None,
    ) -> tuple[Progress, bool]:
        """Load ``snapshot`` into the sft branch: from the live branch if it is its encoder, else
        from the store.

        Returns False, and progress without the snapshot, when it is refused: the branch is then
        unchanged, and an event says why. Raises `UserError` when that is the final encoder.
        """
        started = time.monotonic()
        if snapshot.id == GIVEN:
            pass  # it is there since the start (`initial_weights`)
        elif live is not None and snapshot.pretrain == progress.pretrain:
            self._mark_in_use(snapshot.id)
            sft.load_encoder(live)
        else:
            self._mark_in_use(snapshot.id)  # from here on it is not pruned
            try:
                sft.load_encoder(self.store.open(snapshot.id, self._architecture))
            except FragmentError as error:
                self._mark_in_use(progress.in_use)
                return self._refuse(progress, snapshot, str(error)), False
        seconds = time.monotonic() - started
        self.monitor.event(
            "swap",
            snapshot=snapshot.id,
            cause=snapshot.cause,
            stage=sft.stage.name,
            pretrain=snapshot.pretrain,
            sft=progress.sft,
            steps=progress.steps,
            swap_seconds=seconds,
            checksum=self._verified_checksum(sft, snapshot),
            nll_before=self._last_nll,
        )
        self._swapped_at = progress.sft
        self._encoder_scalars(progress, swap_seconds=seconds, in_use=float(snapshot.pretrain))
        # TensorBoard shows it as a point on the threshold's line, beside the curve of CKA.
        mark = {"swap_mark": self.recipe.drift.threshold}
        self.monitor.scalars({"steps": progress.steps, "branch": "sft", "stage": "drift"}, mark)
        return progress, True

    def _verified_checksum(self, sft: BranchEngine, snapshot: Snapshot) -> str | None:
        """The checksum of the branch's encoder over all ranks; `UserError` if not the snapshot's.

        None for the given encoder, which is no snapshot.
        """
        if snapshot.id == GIVEN:
            return None
        manifest = distributed.broadcast(
            self.store.manifest(snapshot.id) if distributed.is_main_rank() else {}
        )
        checksum = sft.checksum()
        if manifest.get("checksum") not in (None, checksum):
            raise UserError(
                f"{self.store.folder / snapshot.id}: its encoder has checksum {checksum}, its "
                f"manifest {manifest['checksum']}: remove it, and start again from the last "
                "checkpoint"
            )
        return checksum

    def _mark_in_use(self, name: str | None) -> None:
        """Mark snapshot ``name`` in the store as used by this run, so that it is not pruned.

        A store that cannot be written may still be read: that is an event and stops no swap.
        """
        try:
            self.store.use(_file_name(self._identity), name)
        except OSError as error:
            self.monitor.event("not_marked", snapshot=name, reason=str(error))

    def _log_refused(self, progress: Progress, reason: str, **fields: Any) -> None:
        self.monitor.event("refused", reason=reason, steps=progress.steps, **fields)

    def _refuse(self, progress: Progress, snapshot: Snapshot, reason: str) -> Progress:
        self._log_refused(progress, reason, snapshot=snapshot.id, sft=progress.sft)
        if snapshot.cause == "final":
            raise UserError(f"the final encoder cannot be used: {reason}")
        self._refused.add(snapshot.id)
        usable = tuple(s for s in progress.published if s.id != snapshot.id)
        return replace(progress, published=usable)

    def _encoder_scalars(self, progress: Progress, **values: float) -> None:
        head = {"steps": progress.steps, "branch": "sft", "stage": "encoder"}
        self.monitor.scalars(head, values)

    def log_loss(self, nll: float, progress: Progress) -> None:
        """Keep the loss of an sft line of metrics; the first after a swap is compared with it."""
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


def _more_precise(branch: BranchEngine) -> dict[str, Fragment]:
    """The branch's fp32 masters; none where its weights are as precise."""
    weight = next(branch.module.parameters())
    masters = branch.masters("")
    low = any(
        key.startswith(f"{MASTER}/") and fragment.tensor.dtype != weight.dtype
        for key, fragment in masters.items()
    )
    return masters if low else {}


def _file_name(text: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in text).strip("-")[-80:]
