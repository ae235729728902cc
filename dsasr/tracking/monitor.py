"""A run's metrics and events: into the run log's files, TensorBoard, and the console.

Only rank 0 writes. Values are summed over the ranks once a log interval, not every step, so that a
step needs no synchronization with the host.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch

from dsasr.engine.step_report import StepReport
from dsasr.model.outputs import add_sums
from dsasr.tracking import console
from dsasr.tracking.run_log import EVENTS, LEDGER, METRICS, truncate_log
from dsasr.tracking.tensorboard import TensorBoard
from dsasr.utils import distributed, ranges
from dsasr.utils.io import to_json
from dsasr.utils.memory import process_bytes
from dsasr.utils.ranges import NonNegativeInt, PositiveInt


@dataclass(frozen=True)
class MonitorConfig:
    every: PositiveInt = 10  # steps of a branch between two lines of metrics
    tensorboard: bool = True  # write TensorBoard files too
    ledger: bool = False  # write ledger.jsonl: the samples of every step, on all ranks
    # steps of a stage between two histograms of the gradients of each part in TensorBoard, for
    # which the ranks gather one parameter after the other; 0: none
    gradients: NonNegativeInt = 0

    def __post_init__(self) -> None:
        ranges.check(self)


_TIMES = ("read", "text", "decode", "augment", "feature")  # seconds of the dataloader workers
_COUNTS = ("audio", "frames", "padded", "wait", "bad", "bytes", "queue", "batches", *_TIMES)


class Meter:
    """Sums over one branch's steps since its last line of metrics."""

    def __init__(self, elapsed: float = 0.0) -> None:
        """``elapsed``: seconds since the branch's first step began."""
        self.reset()
        self.started -= elapsed

    def reset(self) -> None:
        self.sums: dict[str, tuple[Any, Any]] = {}
        self.steps = 0.0
        for name in _COUNTS:
            setattr(self, name, 0.0)
        self.started = time.monotonic()

    def add(self, report: StepReport, wait: float) -> None:
        add_sums(self.sums, report.sums)
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
        """The sums as plain numbers, for `load`."""
        values = {k: getattr(self, k) for k in _COUNTS}
        values["sums"] = {k: [float(a), float(b)] for k, (a, b) in self.sums.items()}
        return values | {"steps": self.steps, "elapsed": time.monotonic() - self.started}

    def load(self, state: Mapping[str, Any]) -> None:
        """Add the sums of `state`, of a rank that took the same steps."""
        for name in _COUNTS:
            setattr(self, name, getattr(self, name) + state.get(name, 0.0))
        self.steps = max(self.steps, state["steps"])
        add_sums(self.sums, state["sums"])
        self.started = min(self.started, time.monotonic() - state["elapsed"])

    def collect(self) -> dict[str, float]:
        """Means and rates over all ranks since the last call, of what was counted; collective."""
        gathered = distributed.all_gather_object((sorted(self.sums), peak_memory()))
        names = sorted({name for of_rank, _ in gathered for name in of_rank})
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
            # Neither: nothing was counted, because all samples were dropped.
            if summed[2 * i] or summed[2 * i + 1]
        }
        line |= {
            "audio_hours_per_hour": data["audio"] / elapsed,
            "padding_share": 1 - data["frames"] / data["padded"] if data["padded"] else 0.0,
            "wait_share": data["wait"] / distributed.world_size() / elapsed,
            "step_seconds": elapsed / max(self.steps, 1),
            "bad_samples": data["bad"],
            "bytes_per_second": data["bytes"] / elapsed,
            "queue_depth": data["queue"] / max(data["batches"], 1.0),
            "memory_bytes": float(max(memory for _, memory in gathered)),
        }
        # What a second of audio costs the dataloader workers, in milliseconds of one core.
        line |= {f"{name}_ms_per_s": 1e3 * data[name] / max(data["audio"], 1e-9) for name in _TIMES}
        self.reset()
        return line


def peak_memory() -> int:
    """Bytes of this rank: on a GPU the most that tensors have had since the last call, else what
    the process has in memory now."""
    if not torch.cuda.is_available():
        with suppress(OSError):
            return process_bytes()
        return 0
    peak = torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return peak


class Monitor:
    """Writes a run's metrics and events to its folder, and a line of each to the console."""

    def __init__(
        self,
        folder: Path,
        config: MonitorConfig,
        total_steps: int,
        from_steps: int = 0,
        written: Mapping[str, int] | None = None,
        *,
        stages: Mapping[str, str] | None = None,
        hparams: Mapping[str, Any] | None = None,
    ):
        """``from_steps``: steps of the checkpoint resumed from; lines of later steps are removed.

        ``written``: each file's number of lines at that checkpoint (from `state`): a line that
        follows it and precedes the next step has the same number of steps.

        ``stages`` and ``hparams``: see `TensorBoard`.
        """
        self.config = config
        self.total_steps = total_steps
        self._meters: dict[str, Meter] = {}
        self._began = self._started = time.monotonic()  # of this process, of the run
        self._first: int | None = None  # steps done before this process' first one
        self._last_steps = from_steps
        self._board: TensorBoard | None = None
        self._write_error = ""  # why the last line could not be written
        self._files: dict[str, TextIO] = {}
        self._lines: dict[str, int] = {}
        if distributed.is_main_rank():
            folder.mkdir(parents=True, exist_ok=True)
            for name in (METRICS, EVENTS, *[LEDGER] * config.ledger):
                self._lines[name] = truncate_log(
                    folder / name, from_steps, (written or {}).get(name)
                )
                self._files[name] = open(folder / name, "a", encoding="utf-8")  # noqa: SIM115
            if config.tensorboard:
                board = folder / "tensorboard"
                self._board = TensorBoard(board, stages or {}, hparams, from_steps)

    def step(
        self,
        report: StepReport,
        steps: int,
        wait: float,
        last: bool = False,
        extra: Mapping[str, float] | None = None,
        seconds: float = 0.0,
    ) -> dict | None:
        """Count a step; write a line when one is due and return it (on every rank); collective.

        ``wait``: seconds that the step waited for its batches; ``seconds``: that it took in all,
        the wait among them. ``extra``: further values of the line, if one is written.
        """
        if self._first is None:
            self._first = steps - 1
        self._last_steps = steps
        meter = self._meters.setdefault(report.branch, Meter(seconds))
        meter.add(report, wait)
        if self.config.ledger:
            self._write_ledger(report, steps)
        if report.gradients and self._board is not None:
            with self._tolerate_full_disk():
                self._board.gradients(report.branch, report.gradients, steps)
        if not last and (report.step + 1) % self.config.every:
            return None
        line = meter.collect()
        line |= {f"lr_{part}": lr for part, lr in report.lrs.items()}
        if report.grad_norm is not None:
            line["grad_norm"] = float(report.grad_norm)
        line |= extra or {}
        head = {"steps": steps, "branch": report.branch, "stage": report.stage}
        self._write(head | {"step": report.step + 1}, line)
        self._progress(report, steps, line)
        return line

    def state(self) -> dict[str, Any]:
        """The sums not yet written, of all ranks, for the checkpoint; collective."""
        meters = {branch: meter.state() for branch, meter in self._meters.items()}
        return {
            "meters": distributed.all_gather_object(meters),
            "seconds": time.monotonic() - self._started,
            "written": dict(self._lines),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore `state`; with another world size rank r takes the sums of ranks r, r + world …"""
        self._started = time.monotonic() - state["seconds"]
        for meters in state["meters"][distributed.rank() :: distributed.world_size()]:
            for branch, sums in meters.items():
                self._meters.setdefault(branch, Meter()).load(sums)

    def _write_ledger(self, report: StepReport, steps: int) -> None:
        """The step's line of the ledger: epoch and keys of each rank's micro-batches."""
        samples = distributed.all_gather_object(
            [[batch.epoch, list(batch.keys)] for batch in report.batches]
        )
        head = {"steps": steps, "branch": report.branch, "stage": report.stage}
        self._append(LEDGER, {**head, "step": report.step + 1, "samples": samples})

    def _append(self, name: str, line: Mapping[str, Any]) -> None:
        if name in self._files:
            with self._tolerate_full_disk():
                self._files[name].write(to_json(line) + "\n")
                self._files[name].flush()
                self._lines[name] += 1

    def _write(self, head: Mapping[str, Any], line: Mapping[str, float]) -> None:
        self._append(METRICS, {**head, "seconds": self._seconds(), **line})
        if self._board is not None:
            with self._tolerate_full_disk():
                self._board.line(head, line)

    def _seconds(self) -> float:
        return round(time.monotonic() - self._started, 3)

    @contextmanager
    def _tolerate_full_disk(self) -> Iterator[None]:
        """Print why a line is lost, once a reason: rank 0 must not stop alone for it."""
        try:
            yield
        except OSError as error:
            if str(error) != self._write_error:
                self._write_error = str(error)
                print(console.warning_line(f"metrics cannot be written: {error}"), flush=True)

    def _progress(self, report: StepReport, steps: int, line: Mapping[str, float]) -> None:
        if not distributed.is_main_rank():
            return
        seconds_a_step = (time.monotonic() - self._began) / max(steps - (self._first or 0), 1)
        left = seconds_a_step * (self.total_steps - steps)
        where = steps, self.total_steps, report.stage, report.step + 1
        print(console.progress_line(*where, line, left), flush=True)

    def scalars(self, head: Mapping[str, Any], values: Mapping[str, float]) -> None:
        """Write values outside a step's line: evaluation, CKA, swap costs; ``head`` as a line's."""
        self._write(head, values)

    def event(self, kind: str, **fields: Any) -> None:
        """Write and print something that happens once: a drift trigger, a swap, a checkpoint …

        The kinds and their fields are those of `console.event_line`.
        """
        if not distributed.is_main_rank():
            return
        self._append(EVENTS, {"event": kind, "seconds": self._seconds(), **fields})
        steps = fields.get("steps", self._last_steps)
        line = console.event_line(steps, self.total_steps, kind, fields)
        if self._board is not None:
            with self._tolerate_full_disk():
                self._board.event(kind, fields, line, steps)
        print(line, flush=True)

    @property
    def has_board(self) -> bool:
        """Whether this rank writes TensorBoard files."""
        return self._board is not None

    def text(self, branch: str, name: str, text: str, steps: int) -> None:
        """Write Markdown to TensorBoard."""
        if self._board is not None:
            with self._tolerate_full_disk():
                self._board.text(branch, name, text, steps)

    def audio(self, branch: str, name: str, wave: np.ndarray, rate: int, steps: int) -> None:
        """Write a sound to TensorBoard: float32 [n] in [−1, 1], at ``rate`` Hz."""
        if self._board is not None:
            with self._tolerate_full_disk():
                self._board.audio(branch, name, wave, rate, steps)

    def close(self) -> None:
        for handle in (*self._files.values(), *([self._board] if self._board else [])):
            with self._tolerate_full_disk():
                handle.close()
        sys.stdout.flush()
