"""What a run says of itself: metrics.jsonl and events.jsonl always, TensorBoard, a progress line.

Only rank 0 writes. Sums over ranks are made when a line is due, not every step, so that a step
needs no synchronization with the host.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch

from dsasr.engine.step_report import StepReport
from dsasr.utils import distributed
from dsasr.utils.io import atomic_write, read_lines, to_json


@dataclass(frozen=True)
class MonitorConfig:
    every: int = 10  # steps of a branch between two lines
    tensorboard: bool = True
    ledger: bool = False  # ledger.jsonl: which samples each step was made of, on all ranks


OF_THE_JOB = ("checkpoint", "checkpoint_failed", "checkpoint_passed_over", "resumed", "stopped")
METRICS, EVENTS, LEDGER = "metrics.jsonl", "events.jsonl", "ledger.jsonl"
# Curves that TensorBoard is to draw into one chart.
CHARTS = {
    "encoder": {
        "drift and swaps": ["Multiline", ["drift/cka$", "drift/cka_threshold", "drift/swap_mark"]],
        "loss around a swap": ["Multiline", ["encoder/nll_before", "encoder/nll_after"]],
    }
}
_TIMES = ("read", "text", "decode", "augment", "feature")  # seconds of the makers, over all workers
_COUNTS = ("audio", "frames", "padded", "wait", "bad", "bytes", "queue", "batches", *_TIMES)


class Meter:
    """Sums of one branch's steps since its last line."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.sums: dict[str, tuple[Any, Any]] = {}
        self.steps = 0.0
        for name in _COUNTS:
            setattr(self, name, 0.0)
        self.started = time.monotonic()

    def add(self, report: StepReport, wait: float) -> None:
        for name, (total, count) in report.sums.items():
            old = self.sums.get(name, (0.0, 0.0))
            self.sums[name] = (old[0] + total, old[1] + count)
        for batch in report.batches:
            self.audio += batch.audio_seconds
            self.padded += batch.features_BTF.shape[0] * batch.features_BTF.shape[1]
            self.frames += float(batch.feature_lengths_B.sum())
            self.bad += len(batch.bad)
            self.bytes += batch.stats.get("bytes", 0.0)
            self.queue += batch.stats.get("queue", 0.0)
            self.batches += 1
            for name in _TIMES:
                setattr(self, name, getattr(self, name) + batch.stats.get(f"{name}_s", 0.0))
        self.wait += wait
        self.steps += 1

    def state(self) -> dict[str, Any]:
        """The sums as plain numbers."""
        values = {k: getattr(self, k) for k in _COUNTS}
        values["sums"] = {k: [float(a), float(b)] for k, (a, b) in self.sums.items()}
        return values | {"steps": self.steps, "elapsed": time.monotonic() - self.started}

    def load(self, state: Mapping[str, Any]) -> None:
        """Add what `state` gave, of a rank that made the same steps."""
        for name in _COUNTS:
            setattr(self, name, getattr(self, name) + state.get(name, 0.0))
        self.steps = max(self.steps, state["steps"])
        for name, (total, count) in state["sums"].items():
            old = self.sums.get(name, (0.0, 0.0))
            self.sums[name] = (old[0] + total, old[1] + count)
        self.started = min(self.started, time.monotonic() - state["elapsed"])

    def collect(self) -> dict[str, float]:
        """Means and rates over all ranks since the last call; collective."""
        names = sorted(
            {n for held in distributed.all_gather_object(sorted(self.sums)) for n in held}
        )
        values = []
        for name in names:
            total, count = self.sums.get(name, (0.0, 0.0))
            values += [float(total), float(count)]
        values += [getattr(self, name) for name in _COUNTS]
        summed = distributed.all_reduce_sum(
            torch.tensor(values, dtype=torch.float64, device=distributed.device())
        ).tolist()
        elapsed = max(time.monotonic() - self.started, 1e-9)
        data = dict(zip(_COUNTS, summed[2 * len(names) :], strict=True))
        line = {
            name: summed[2 * i] / summed[2 * i + 1] if summed[2 * i + 1] else math.nan
            for i, name in enumerate(names)
        }
        line |= {
            "audio_hours_per_hour": data["audio"] / elapsed,
            "padding_share": 1 - data["frames"] / data["padded"] if data["padded"] else 0.0,
            "wait_share": data["wait"] / distributed.world_size() / elapsed,
            "step_seconds": elapsed / max(self.steps, 1),
            "bad_samples": data["bad"],
            "bytes_per_second": data["bytes"] / elapsed,
            "queue_depth": data["queue"] / max(data["batches"], 1.0),
        }
        # What a second of audio costs the makers, in milliseconds of one core.
        line |= {f"{name}_ms_per_s": 1e3 * data[name] / max(data["audio"], 1e-9) for name in _TIMES}
        self.reset()
        return line


class Monitor:
    """Writes a run's metrics and events, and the progress line on a terminal or in a log."""

    def __init__(
        self,
        folder: Path,
        config: MonitorConfig,
        total_steps: int,
        from_steps: int = 0,
        written: Mapping[str, int] | None = None,
    ):
        """``from_steps``: go on after so many; lines that a killed run wrote beyond are dropped.

        ``written``: of each file, the lines that were there at that point (from `state`), for what
        comes after it and before the next step belongs to the same number of steps.
        """
        self.config = config
        self.total_steps = total_steps
        self._meters: dict[str, Meter] = {}
        self._began = self._started = time.monotonic()  # of this process, of the run
        self._first: int | None = None
        self._writer = None
        self._unwritten = ""  # why the last line could not be written
        self._files: dict[str, TextIO] = {}
        self._lines: dict[str, int] = {}
        if distributed.is_main_rank():
            folder.mkdir(parents=True, exist_ok=True)
            for name in (METRICS, EVENTS, *[LEDGER] * config.ledger):
                self._lines[name] = _cut(folder / name, from_steps, (written or {}).get(name))
                self._files[name] = open(folder / name, "a", encoding="utf-8")  # noqa: SIM115
            if config.tensorboard:
                from torch.utils.tensorboard import SummaryWriter

                purge = from_steps + 1 if from_steps else None
                self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=purge)
                self._writer.add_custom_scalars(CHARTS)

    def step(
        self,
        report: StepReport,
        steps: int,
        wait: float,
        last: bool = False,
        more: Mapping[str, float] | None = None,
    ) -> dict | None:
        """Count a step; write a line when one is due and return it (on every rank); collective.

        ``more`` joins the line, if one is written.
        """
        if self._first is None:
            self._first = steps - 1
        meter = self._meters.setdefault(report.branch, Meter())
        meter.add(report, wait)
        if self.config.ledger:
            self._account(report, steps)
        if not last and (report.step + 1) % self.config.every:
            return None
        line = meter.collect()
        line |= {f"lr_{part}": lr for part, lr in report.lrs.items()}
        if report.grad_norm is not None:
            line["grad_norm"] = float(report.grad_norm)
        line |= more or {}
        head = {"steps": steps, "branch": report.branch, "stage": report.stage}
        self._write(head | {"step": report.step + 1}, line)
        self._progress(report, steps, line)
        return line

    def state(self) -> dict[str, Any]:
        """What is counted but not yet written, of all ranks, for the checkpoint; collective."""
        own = {branch: meter.state() for branch, meter in self._meters.items()}
        seconds = time.monotonic() - self._started
        return {
            "meters": distributed.all_gather_object(own),
            "seconds": seconds,
            "written": dict(self._lines),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on counting where `state` was; on another world size rank r takes r, r + world …"""
        self._started = time.monotonic() - state["seconds"]
        for held in state["meters"][distributed.rank() :: distributed.world_size()]:
            for branch, values in held.items():
                self._meters.setdefault(branch, Meter()).load(values)

    def _account(self, report: StepReport, steps: int) -> None:
        """Into the ledger: of each rank and micro-batch its epoch and its samples' keys."""
        samples = distributed.all_gather_object(
            [[batch.epoch, list(batch.keys)] for batch in report.batches]
        )
        head = {"steps": steps, "branch": report.branch, "stage": report.stage}
        self._append(LEDGER, {**head, "step": report.step + 1, "samples": samples})

    def _append(self, name: str, line: Mapping[str, Any]) -> None:
        if name in self._files:
            with self._despite_full_disk():
                self._files[name].write(to_json(line) + "\n")
                self._files[name].flush()
                self._lines[name] += 1

    def _write(self, head: Mapping[str, Any], line: Mapping[str, float]) -> None:
        self._append(METRICS, {**head, "seconds": self._seconds(), **line})
        if self._writer is not None:
            with self._despite_full_disk():
                for name, value in line.items():
                    self._writer.add_scalar(f"{head['stage']}/{name}", value, head["steps"])

    def _seconds(self) -> float:
        return round(time.monotonic() - self._started, 3)

    @contextmanager
    def _despite_full_disk(self) -> Iterator[None]:
        """A line lost is told, once a reason; it is no reason for rank 0 to leave the others."""
        try:
            yield
        except OSError as error:
            if str(error) != self._unwritten:
                self._unwritten = str(error)
                print(f"— metrics cannot be written: {error}", flush=True)

    def _progress(self, report: StepReport, steps: int, line: Mapping[str, float]) -> None:
        if not distributed.is_main_rank():
            return
        done = steps - (self._first or 0)
        left = (time.monotonic() - self._began) / max(done, 1) * (self.total_steps - steps)
        losses = " ".join(
            f"{k} {line[k]:.3f}"
            for k in ("ctc", "consistency", "nll", "entropy", "accuracy")
            if k in line
        )
        text = (
            f"[{steps}/{self.total_steps}] {report.stage} {report.step + 1}  {losses}  "
            f"{line['audio_hours_per_hour']:.0f} h/h  {clock(left)} left"
        )
        print(text, flush=True)

    def scalars(self, head: Mapping[str, Any], values: Mapping[str, float]) -> None:
        """Values outside a step's line: evaluation, CKA, swap costs. Rank 0 writes."""
        self._write(head, values)

    def event(self, kind: str, **fields: Any) -> None:
        """Something that happened once: a trigger, a swap, a checkpoint, a stage's end."""
        if not distributed.is_main_rank():
            return
        self._append(EVENTS, {"event": kind, "seconds": self._seconds(), **fields})
        shown = "  ".join(f"{k}={_short(v)}" for k, v in fields.items())
        print(f"— {kind}: {shown}", flush=True)

    def text(self, name: str, text: str, steps: int) -> None:
        """A text sample for TensorBoard."""
        if self._writer is not None:
            with self._despite_full_disk():
                self._writer.add_text(name, text, steps)

    def close(self) -> None:
        for handle in (*self._files.values(), *([self._writer] if self._writer else [])):
            with self._despite_full_disk():
                handle.close()
        sys.stdout.flush()


def add_images(folder: Path, pictures: Sequence[Path], steps: int) -> None:
    """Show PNGs in a TensorBoard folder, under ``report/``."""
    import numpy as np
    from PIL import Image
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder)) as writer:
        for path in pictures:
            image = np.asarray(Image.open(path).convert("RGB"))
            writer.add_image(f"report/{path.stem}", image, steps, dataformats="HWC")


def _cut(path: Path, steps: int, written: int | None) -> int:
    """Keep the first ``written`` lines, of the first ``steps`` steps: the rest will be made again.

    What tells of the job and not of the training stays. Returns how many lines are left.
    """
    if not path.is_file():
        return 0
    kept = []
    for number, line in enumerate(read_lines(path)):
        try:
            held = json.loads(line)
        except ValueError:
            continue  # the torn last line of a killed run
        before = written is None or number < written or held.get("event") in OF_THE_JOB
        if steps and before and held.get("steps", 0) <= steps:
            kept.append(line + "\n")
    atomic_write(path, "".join(kept))
    return len(kept)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def clock(seconds: float) -> str:
    """``1:02:03`` or ``2:03`` of a duration in seconds."""
    seconds = max(int(seconds), 0)
    hours, rest = divmod(seconds, 3600)
    minutes, seconds = divmod(rest, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
