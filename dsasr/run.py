"""One run: its two branches and all that goes with them, in the steps that `train.py` orders."""

from __future__ import annotations

import dataclasses
import math
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dsasr import config, ranks
from dsasr.build import Builder
from dsasr.checkpoint import Checkpoints
from dsasr.data.batching import Batch
from dsasr.data.stream import BadSampleLog, Stream
from dsasr.drift import DriftMonitor
from dsasr.engine import Branch, StepReport
from dsasr.errors import UserError
from dsasr.evaluation import validate
from dsasr.files import atomic_write
from dsasr.fragments import FragmentError, FragmentReader
from dsasr.monitor import Monitor
from dsasr.partition import MASTER
from dsasr.recipe import Recipe, changes
from dsasr.snapshots import DriftTrigger, SnapshotStore
from dsasr.stages import Progress, Snapshot, StageConfig, Turn, with_published

GIVEN = "given"


class Stopped(Exception):
    """The run was asked to stop; its checkpoint is written."""


class Run:
    """What `train.py` drives. Every public method is collective."""

    def __init__(self, recipe: Recipe):
        self.recipe = recipe
        self.schedule = recipe.schedule()
        self.build = Builder(recipe)
        self.build.check()
        self.checkpoints = Checkpoints(recipe.folder / "checkpoints", recipe.checkpoint)
        self.store = SnapshotStore(recipe.store_folder, recipe.store.keep)
        self.trigger = DriftTrigger(recipe.drift.threshold)
        self.progress = Progress()
        self.branches: dict[str, Branch] = {}
        self._streams: dict[str, tuple[str, Stream]] = {}
        self._cursors: dict[str, tuple[str, dict]] = {}
        self._probe: DriftMonitor | None = None
        self._reference: str | None = None
        self._wait = 0.0
        self._polled = -math.inf
        self._signal: int | None = None
        self._refused: set[str] = set()
        self._finished = False
        self._waits_at = -1  # sft step at which a wait was last told
        self._last_nll: float | None = None  # of the sft branch's last line
        self._swapped_at: int | None = None  # sft step of a swap that no line has followed yet
        self.stage_seconds: dict[str, float] = {}
        self._turn_started = time.monotonic()
        reader = self._resume_from()
        self.monitor = Monitor(
            recipe.folder,
            recipe.monitor,
            self._total_steps(),
            reader.manifest["steps"] if reader else 0,
        )
        self.bad = BadSampleLog(
            recipe.folder / "bad_samples.jsonl", recipe.data.bad_limits, rank=ranks.rank()
        )
        self._begin(reader)

    # -- start, resume -----------------------------------------------------------------------

    @property
    def steps(self) -> int:
        """Optimizer steps done, over both branches."""
        return self.progress.pretrain + self.progress.sft

    def _total_steps(self) -> int:
        wanted = {"both": ("pretrain", "sft")}.get(self.recipe.branch, (self.recipe.branch,))
        return sum(s.steps for s in self.recipe.stages if s.branch in wanted)

    def _resume_from(self) -> FragmentReader | None:
        """The checkpoint to go on from, or None for a fresh start; refuses a changed recipe."""
        if self.recipe.resume == "never":
            if self.checkpoints.list():
                raise UserError(
                    f"{self.recipe.folder} holds a run already: resume=auto goes on with it, "
                    "run=FOLDER starts another one"
                )
            return None
        passed_over: list[str] = []
        if self.recipe.resume == "auto":
            reader, passed_over = self.checkpoints.newest()
        else:
            try:
                reader = FragmentReader(Path(self.recipe.resume))
            except FragmentError as error:
                raise UserError(f"resume={self.recipe.resume}: {error}") from None
        for reason in passed_over:
            if ranks.main_rank():
                print(f"checkpoint passed over: {reason}", flush=True)
        if reader is not None and not self.recipe.allow_changed:
            changed = changes(reader.manifest["recipe"], self.recipe)
            if changed:
                raise UserError(
                    f"{self.recipe.folder} was trained with another recipe ({'; '.join(changed)}): "
                    "give run=FOLDER for a new run, or allow_changed=true to go on regardless"
                )
        return reader

    def _begin(self, reader: FragmentReader | None) -> None:
        if ranks.main_rank():
            atomic_write(self.recipe.folder / "recipe.yaml", config.dump(self.recipe))
        if self.schedule.pretrain and self.recipe.branch != "sft":
            self.store.claim(self._identity())
            if reader is None:
                self._check_store()
        if reader is not None:
            self._restore(reader)
            self.monitor.event("resumed", steps=self.steps, checkpoint=reader.folder.name)
        elif self.recipe.encoder_given:
            given = Snapshot(GIVEN, 0, "given")
            self.progress = with_published(self.progress, [given])
        signal.signal(signal.SIGTERM, self._on_signal)
        signal.signal(signal.SIGUSR1, self._on_signal)

    def _check_store(self) -> None:
        """A fresh start may find its own snapshots of an earlier attempt, but no other recipe's."""
        own = self.recipe.encoder_fingerprint()
        held = ranks.broadcast(self.store.manifests() if ranks.main_rank() else [])
        if any(m.get("config") != own for m in held):
            raise UserError(
                f"{self.store.folder} holds encoders of another recipe: give store.path=FOLDER or "
                "run=FOLDER, or delete it"
            )

    def _identity(self) -> str:
        return str(self.recipe.folder.resolve())

    def _on_signal(self, number: int, _frame: Any) -> None:
        self._signal = number

    def _restore(self, reader: FragmentReader) -> None:
        held = reader.manifest
        published = tuple(Snapshot(**s) for s in held["progress"].pop("published"))
        self.progress = Progress(**held["progress"], published=published)
        stages = {s.name: s for s in self.recipe.stages}
        for name, entry in held["branches"].items():
            self._branch(name).load(reader, stages.get(entry["stage"]), entry["adam_steps"])
        self._cursors = {k: (v["stage"], v["state"]) for k, v in held["streams"].items()}
        self.stage_seconds = dict(held["stage_seconds"])
        self._reference = held["reference"]
        self.monitor.load(held["monitor"])
        self._finished = held["finished"]
        self._last_nll, self._swapped_at = held["last_nll"], held["swapped_at"]
        if self._reference is not None and self.recipe.branch != "sft":
            self._drift().load(reader)
            self._drift().seconds = held["drift_seconds"]

    # -- turns -------------------------------------------------------------------------------

    def turn(self) -> Turn:
        """What comes next; in a concurrent run after a look at the store."""
        if self.recipe.branch == "sft":
            self._poll()
        return self.schedule.at(self.progress)

    def enter(self, stage: StageConfig) -> Branch:
        """The branch of ``stage``, in that stage; the other branch is parked."""
        self._turn_started = time.monotonic()
        branch = self._branch(stage.branch)
        for other in self.branches.values():
            if other is not branch:
                other.park()
        if branch.stage is None or branch.stage.name != stage.name:
            started = time.monotonic()
            branch.enter(stage)
            self.monitor.event(
                "stage",
                name=stage.name,
                branch=branch.name,
                steps=self.steps,
                switch_seconds=time.monotonic() - started,
            )
        else:
            branch.unpark()
        return branch

    def _branch(self, name: str) -> Branch:
        if name not in self.branches:
            module = self.build.module(name)
            self.branches[name] = Branch(name, module, self.recipe.engine, self.recipe.folder)
        return self.branches[name]

    def batches(self, stage: StageConfig) -> list[Batch]:
        """This rank's micro-batches of the next step."""
        started = time.monotonic()
        held = self._streams.get(stage.branch)
        if held is None or held[0] != stage.name:
            if held is not None:
                held[1].close()
            name, state = self._cursors.get(stage.branch, ("", None))
            stream = self.build.train_stream(stage, state if name == stage.name else None)
            self._streams[stage.branch] = held = (stage.name, stream)
        batches = [next(held[1]) for _ in range(stage.accumulate)]
        self._cursors[stage.branch] = (stage.name, batches[-1].state)
        self._wait = time.monotonic() - started
        for batch in batches:
            self.bad.add(batch.bad, steps=self.steps, stage=stage.name, epoch=batch.epoch)
        return batches

    def advance(self, turn: Turn) -> None:
        """Count the step that was made, and the time that its stage has taken."""
        self.progress = self.schedule.advance(self.progress, turn)
        name = turn.stage.name
        spent = self.stage_seconds.get(name, 0.0) + time.monotonic() - self._turn_started
        self.stage_seconds[name] = spent
        if turn.step + 1 == turn.stage.steps:
            self.monitor.event("stage_end", name=name, steps=self.steps, stage_seconds=spent)

    # -- encoders ----------------------------------------------------------------------------

    def swap(self, branch: Branch, snapshot: Snapshot) -> bool:
        """Put ``snapshot`` into the sft branch: from the live branch if that is it, else the store.

        False when it was refused; the branch then goes on as it is, and the log says why.
        """
        started = time.monotonic()
        live = self.branches.get("pretrain")
        self.store.use(_file_name(self._identity()), snapshot.id)  # from here on it is not pruned
        if snapshot.id == GIVEN:
            branch.load_encoder(self._given())
        elif live is not None and snapshot.pretrain == self.progress.pretrain:
            branch.load_encoder(live)
        else:
            try:
                branch.load_encoder(self.store.open(snapshot.id, self._architecture()))
            except FragmentError as error:
                self._refuse(snapshot, str(error))
                return False
        seconds = time.monotonic() - started
        checked = self._check_swap(branch, snapshot)
        self.monitor.event(
            "swap",
            snapshot=snapshot.id,
            cause=snapshot.cause,
            stage=branch.stage.name,
            pretrain=snapshot.pretrain,
            sft=self.progress.sft,
            steps=self.steps,
            swap_seconds=seconds,
            checksum=checked,
            nll_before=self._last_nll,
        )
        self._swapped_at = self.progress.sft
        head = {"steps": self.steps, "branch": "sft", "stage": "encoder"}
        self.monitor.scalars(head, {"swap_seconds": seconds, "in_use": snapshot.pretrain})
        self.monitor.text("encoder", f"{snapshot.id} ({snapshot.cause})", self.steps)
        if snapshot.cause == "final" and live is not None:
            # Nothing needs the pretrain branch any more.
            live.close()
            del self.branches["pretrain"]
            _, stream = self._streams.pop("pretrain", ("", None))
            if stream is not None:
                stream.close()
        return True

    def _check_swap(self, branch: Branch, snapshot: Snapshot) -> str | None:
        """The checksum of the branch's encoder over all ranks: the snapshot's, or it stops."""
        if snapshot.id == GIVEN:
            return None
        manifest = ranks.broadcast(self.store.manifest(snapshot.id) if ranks.main_rank() else {})
        found = branch.checksum()
        if manifest.get("checksum") not in (None, found):
            raise RuntimeError(
                f"{snapshot.id} was loaded wrongly: checksum {found}, not {manifest['checksum']}"
            )
        return found

    def _refuse(self, snapshot: Snapshot, reason: str) -> None:
        """Go on without ``snapshot``; there is no going on without the final one."""
        self.monitor.event(
            "refused", snapshot=snapshot.id, reason=reason, steps=self.steps, sft=self.progress.sft
        )
        if snapshot.cause == "final":
            raise UserError(f"the final encoder cannot be used: {reason}")
        self._refused.add(snapshot.id)
        rest = tuple(s for s in self.progress.published if s.id != snapshot.id)
        self.progress = dataclasses.replace(self.progress, published=rest)

    def _architecture(self) -> str:
        return config.fingerprint(config.to_plain(self.recipe.model.encoder))

    def _given(self) -> FragmentReader:
        try:
            return FragmentReader(Path(self.recipe.model.encoder_from))
        except FragmentError as error:
            raise UserError(f"model.encoder_from: {error}") from None

    def drift_cause(self) -> tuple[str | None, dict[str, Any]]:
        """Whether to publish the encoder after this pretrain step, and what was measured."""
        at = self.progress.pretrain
        cause, found = self.schedule.publishes_at(at), {}
        due = self.schedule.measures_at(at)
        branch = self.branches["pretrain"]
        if due == "reference":
            self._drift().take_reference(branch)
            self._reference = f"step-{at}"
            self.monitor.event("reference", pretrain=at, steps=self.steps)
        elif due == "measure" and self._reference is not None:
            drift = self._drift().measure(branch)
            found = {"cka": drift.cka}
            values = {"cka": drift.cka, "cka_threshold": self.recipe.drift.threshold}
            values |= {f"cka_layer_{i}": value for i, value in enumerate(drift.layers)}
            values["drift_seconds"] = drift.seconds
            spent = self._drift().seconds
            values["drift_share"] = spent / (spent + sum(self.stage_seconds.values()))
            self._scalars("drift", values)
            self.monitor.event(
                "drift",
                cka=drift.cka,
                threshold=self.recipe.drift.threshold,
                pretrain=at,
                share_of_time=values["drift_share"],
                steps=self.steps,
            )
            if math.isnan(drift.cka):
                self.monitor.event("refused", reason="CKA is not a number", steps=self.steps)
            elif cause is None and self.trigger.fires(drift.cka):
                cause = "drift"
        return cause, found

    def publish(self, cause: str, found: Mapping[str, Any]) -> None:
        """Publish the live encoder for the sft branch; a drifted one becomes the new reference."""
        at, branch = self.progress.pretrain, self.branches["pretrain"]
        snapshot = Snapshot(f"encoder-{at:09d}", at, cause)
        if any(s.id == snapshot.id for s in self.progress.published):
            return
        info = {
            **found,
            "reference": self._reference,
            "parent": self.progress.published[-1].id if self.progress.published else None,
            "architecture": self._architecture(),
            "config": self.recipe.encoder_fingerprint(),
        }
        masters = branch.masters("") if self._low_precision(branch) else {}
        started = time.monotonic()
        try:
            done = self.store.publish(branch.module, masters, snapshot, info)
        except OSError as error:
            self.monitor.event("refused", reason=str(error), snapshot=snapshot.id)
            if cause == "final":
                raise UserError(f"the final encoder could not be published: {error}") from None
            return
        if not done:
            self.monitor.event("refused", reason="a weight is not finite", snapshot=snapshot.id)
            if cause == "final":
                raise UserError("the final encoder has weights that are not finite")
            return
        self.progress = with_published(self.progress, [snapshot])
        if self._probe is not None and self.recipe.drift.mode == "cka":
            self._probe.take_reference(branch)
            self._reference = snapshot.id
        if ranks.main_rank():
            self.store.prune(s.id for s in self.progress.published[-2:])
        self.monitor.event(
            "published",
            snapshot=snapshot.id,
            cause=cause,
            pretrain=at,
            steps=self.steps,
            publish_seconds=time.monotonic() - started,
            **found,
        )

    @staticmethod
    def _low_precision(branch: Branch) -> bool:
        return any(
            key.startswith(f"{MASTER}/") and fragment.tensor.dtype != weight.dtype
            for key, fragment in branch.masters("").items()
            for weight in [next(branch.module.parameters())]
        )

    def _drift(self) -> DriftMonitor:
        if self._probe is None:
            probe = self.build.held_out("pretrain", self.recipe.drift.probe_utterances)
            self._probe = DriftMonitor(self.recipe.drift, probe)
        return self._probe

    def _poll(self) -> None:
        """Look for new snapshots of the other job; rank 0 decides what all ranks see."""
        now = time.monotonic()
        if not ranks.broadcast(now - self._polled >= self.recipe.store.poll_seconds):
            return
        self._polled = now
        found = self.store.snapshots() if ranks.main_rank() else []
        found = [s for s in ranks.broadcast(found) if s.id not in self._refused]
        self.progress = with_published(self.progress, found)

    def wait(self) -> None:
        """Nothing can step before the publisher has moved on; the recipe says how long."""
        if self.recipe.branch == "both":
            raise UserError("pretraining is over, but the next encoder was not published")
        late = self.recipe.store.late
        silent = ranks.broadcast(self.store.silent_for())
        if self._waits_at != self.progress.sft:
            self._waits_at = self.progress.sft
            self.monitor.event("waiting", sft=self.progress.sft, steps=self.steps, late=late)
        if silent > self.recipe.store.silent_seconds and late != "wait":
            usable = self.progress.published
            if late == "stop" or not usable:
                raise UserError(
                    f"{self.store.folder}: its publisher has been silent for {silent:.0f} s"
                )
            last = usable[-1]
            self.monitor.event("publisher_lost", silent_seconds=silent, last=last.id)
            final = Snapshot(last.id, last.pretrain, "final")
            self.progress = dataclasses.replace(self.progress, published=(*usable[:-1], final))
            return
        self._check_signal()
        time.sleep(self.recipe.store.poll_seconds)

    # -- reports -----------------------------------------------------------------------------

    def write(self, report: StepReport) -> None:
        """Count the step; at a line also look for bad numbers, bad data and a wish to stop."""
        stage = next(s for s in self.recipe.stages if s.name == report.stage)
        last = report.step + 1 == stage.steps
        # The norm is the same on all ranks and at hand: no broken weight is ever saved.
        if report.grad_norm is not None and not math.isfinite(report.grad_norm):
            self._not_finite(report)
        line = self.monitor.step(report, self.steps, self._wait, last, self._encoder_line(report))
        if line is None:
            return
        losses = [v for k, v in line.items() if k in ("ctc", "nll", "grad_norm")]
        if not all(map(math.isfinite, losses)):
            self._not_finite(report)
        if report.branch == "sft":
            if self._swapped_at is not None:
                self.monitor.event(
                    "after_swap",
                    nll_before=self._last_nll,
                    nll=line["nll"],
                    steps=self.steps,
                    sft_steps=self.progress.sft - self._swapped_at,
                )
                self._swapped_at = None
            self._last_nll = line["nll"]
        counts: dict[str, int] = {}
        for held in ranks.gather(dict(self.bad.counts)):
            for cause, count in held.items():
                counts[cause] = counts.get(cause, 0) + count
        self.bad.check(counts)
        if report.branch == "pretrain":
            self.store.beat()
        self._check_signal()

    def _encoder_line(self, report: StepReport) -> dict[str, float]:
        """Of the sft branch: which encoder it is on; of both: what the other branch has parked."""
        parked = sum(b.parked_bytes for b in self.branches.values() if b.name != report.branch)
        values = {"parked_bytes": float(parked)}
        in_use = [s for s in self.progress.published if s.id == self.progress.in_use]
        if report.branch == "sft" and in_use:
            values["encoder_in_use"] = float(in_use[0].pretrain)
        return values

    def _not_finite(self, report: StepReport) -> None:
        keys = ", ".join(k for b in report.batches for k in b.keys[:3])
        raise UserError(
            f"stage {report.stage}, step {report.step + 1}: the loss or its gradient is not "
            f"finite (last batch of rank 0: {keys} …); resume from the last checkpoint with "
            "a lower rate"
        )

    def _scalars(self, stage: str, values: Mapping[str, float]) -> None:
        head = {"steps": self.steps, "branch": "pretrain", "stage": stage}
        self.monitor.scalars(head, values)

    def _check_signal(self) -> None:
        if ranks.any_rank(self._signal is not None):
            saved = self.save()
            self.monitor.event("stopped", steps=self.steps, signal=self._signal)
            self._plot()
            if not saved:
                raise UserError("stopped by a signal, and the checkpoint could not be written")
            raise Stopped

    def evaluate_if_due(self, branch: Branch) -> None:
        every = self.recipe.evaluation.every
        if every and self.steps % every == 0:
            self.evaluate(branch, self.recipe.evaluation.utterances)

    def evaluate(self, branch: Branch, utterances: int) -> None:
        """Error rates of ``branch`` on the validation set, into metrics and the log."""
        started = time.monotonic()
        batches = self.build.held_out(branch.name, utterances)
        with branch.evaluating() as module:
            if branch.name == "pretrain":
                rate = validate.phoneme_error_rate(
                    module, batches, device=ranks.device(), sum_ranks=ranks.sum_ranks
                )
                values, shown = {"phoneme_error_rate": rate}, ""
            else:
                found = validate.transcribe(
                    module,
                    batches,
                    self.build.tokenizer,
                    self.recipe.evaluation.decode,
                    device=ranks.device(),
                    any_rank=ranks.any_rank,
                    gather=ranks.gather,
                )
                summary = found.scores(self.recipe.evaluation.rules).summary()
                values = {k: v for k, v in summary.items() if not math.isnan(v)}
                rows = found.rows[:: max(len(found.rows) // self.recipe.evaluation.samples, 1)]
                shown = "\n\n".join(
                    f"ref {r.reference}  \nhyp {r.hypothesis}"
                    for r in rows[: self.recipe.evaluation.samples]
                )
        stage = branch.stage.name
        head = {"steps": self.steps, "branch": branch.name, "stage": f"valid_{stage}"}
        self.monitor.scalars(head, values | {"evaluation_seconds": time.monotonic() - started})
        if shown:
            self.monitor.text(f"valid_{stage}", shown, self.steps)
        self.monitor.event("evaluated", stage=stage, steps=self.steps, **values)

    # -- saving ------------------------------------------------------------------------------

    def save_if_due(self) -> None:
        if self.checkpoints.due(self.steps):
            self.save()

    def save(self) -> bool:
        """Write a checkpoint of everything; a full disk costs the checkpoint, not the run."""
        held = {k: f for b in self.branches.values() for k, f in b.fragments().items()}
        if self._probe is not None:
            held |= self._probe.fragments()
        state = {
            "progress": config.to_plain(self.progress),
            "branches": {
                name: {"stage": b.stage.name if b.stage else None, "adam_steps": b.adam_steps()}
                for name, b in self.branches.items()
            },
            "streams": {k: {"stage": n, "state": s} for k, (n, s) in self._cursors.items()},
            "reference": self._reference,
            "stage_seconds": self.stage_seconds,
            "drift_seconds": self._probe.seconds if self._probe is not None else 0.0,
            "monitor": self.monitor.state(),
            "finished": self._finished,
            "last_nll": self._last_nll,
            "swapped_at": self._swapped_at,
            "recipe": config.to_plain(self.recipe),
        }
        started = time.monotonic()
        try:
            path = self.checkpoints.save(self.steps, held, state)
        except OSError as error:
            self.monitor.event("checkpoint_failed", reason=str(error), steps=self.steps)
            return False
        self.monitor.event(
            "checkpoint", name=path.name, steps=self.steps, save_seconds=time.monotonic() - started
        )
        return True

    def finish(self) -> None:
        """The end of the schedule: evaluate on the whole validation set and save."""
        if not self._finished:
            self._finished = True
            for branch in self.branches.values():
                if branch.stage is not None:
                    self.evaluate(branch, 0)
            if not self.save():
                raise UserError(
                    f"trained to the end, but {self.checkpoints.folder} cannot be written: make "
                    "room and start again, which repeats the steps since the last checkpoint"
                )
        self.monitor.event("finished", steps=self.steps)
        self._plot()

    def _plot(self) -> None:
        """``timeline.png`` in the run folder; a picture that fails is no reason to."""
        if not ranks.main_rank():
            return
        from dsasr.pictures import plot_run

        try:
            plot_run(self.recipe.folder)
        except (OSError, ValueError, ImportError) as error:
            print(f"timeline.png was not drawn: {error}", flush=True)

    def close(self) -> None:
        for _, stream in self._streams.values():
            stream.close()
        self.monitor.close()


def _file_name(text: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in text).strip("-")[-80:]
