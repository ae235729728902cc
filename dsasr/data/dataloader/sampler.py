"""The batch sampler: a stream's position in its datasets, and which rank gets which batch.

A *step* is W consecutive global batches, one for each of W ranks. Endless streams never end an
epoch early: the last batches of one epoch and the first of the next may share a step. Finite
streams (``epochs`` > 0) fill their last step with batches without samples.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from dsasr.data.dataloader.bad_samples import dropped_summary
from dsasr.data.dataloader.window_plan import (
    AugmentedDurations,
    DatasetPart,
    PlanConfig,
    Task,
    Window,
    plan_window,
    splitmix64,
    stable_hash,
)
from dsasr.data.shards.index import ShardIndex
from dsasr.data.shards.sample import DroppedSample
from dsasr.utils.errors import UserError

STATE_VERSION = 1


class PartCursor:
    """The position in one part's windows; the next window is planned in the background."""

    def __init__(
        self,
        part: DatasetPart,
        config: PlanConfig,
        load: Callable[[str], ShardIndex],
        lengths: AugmentedDurations | None,
        pool: ThreadPoolExecutor,
    ) -> None:
        if not len(part.shards):
            raise UserError(f"dataset '{part.name}' has no shards")
        self.part, self.config, self.load, self.lengths, self.pool = (
            part, config, load, lengths, pool,
        )  # fmt: skip
        self.epoch = self.window = self.batch = 0
        self.delivered = 0
        self.current: Window | None = None
        self.prefetched: tuple[tuple[int, int], Future] | None = None  # (epoch, window), its plan
        self.layouts: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self.empty_windows = 0  # of the epoch, in a row without a sample that is within all limits
        self.dropped: Counter[str] = Counter()  # samples of those windows by cause
        self.last_dropped: DroppedSample | None = None

    def layout(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The epoch's shard order [shards], and the windows' edges in it [windows + 1]."""
        if epoch not in self.layouts:
            count = len(self.part.shards)
            order = np.arange(count, dtype=np.int32)
            if self.config.shuffle:
                seed = stable_hash("shards", self.config.seed, self.part.name, epoch)
                order = np.random.default_rng(seed).permutation(count).astype(np.int32)
            edges = [0]
            ends = None
            if self.part.counts is not None:
                ends = np.cumsum(np.asarray(self.part.counts)[order])
            while edges[-1] < count:
                first = edges[-1]
                last = first + self.config.window
                if ends is not None:
                    goal = (ends[first - 1] if first else 0) + self.config.window_samples
                    last = max(last, int(np.searchsorted(ends, goal)) + 1)
                edges.append(min(last, count))
            self.layouts = {e: v for e, v in self.layouts.items() if e >= epoch - 1}
            self.layouts[epoch] = (order, np.asarray(edges))
        return self.layouts[epoch]

    def plan(self, epoch: int, number: int) -> Window:
        order, edges = self.layout(epoch)
        shards = [self.part.shards[i] for i in order[edges[number] : edges[number + 1]].tolist()]
        indexes = [self.load(shard) for shard in shards]
        return plan_window(self.part, epoch, number, shards, indexes, self.config, self.lengths)

    def following(self, epoch: int, number: int) -> tuple[int, int]:
        """(epoch, window) after these."""
        if number + 1 < len(self.layout(epoch)[1]) - 1:
            return epoch, number + 1
        return epoch + 1, 0

    def seek(self) -> bool:
        """Move to the next batch to deliver, loading windows as needed; False at the end."""
        while True:
            if self.config.epochs and self.epoch >= self.config.epochs:
                return False
            if self.current is None:
                self.load_window()
            if len(self.current.ranges):
                self.empty_windows = 0
                self.dropped.clear()
            if self.batch < len(self.current):
                return True
            self._count_empty(self.current)
            following = self.following(self.epoch, self.window)
            if following[0] > self.epoch:
                windows = len(self.layout(self.epoch)[1]) - 1
                if self.empty_windows == windows and not self.config.epochs:
                    where = f" in language '{self.part.lang}'" if self.part.lang else ""
                    known = self.dropped or not self.part.lang
                    what = dropped_summary(self.dropped, self.last_dropped) if known else ""
                    raise UserError(f"dataset '{self.part.name}' has no usable sample{where}{what}")
                self.empty_windows = 0
                self.dropped.clear()
            (self.epoch, self.window), self.batch, self.current = following, 0, None

    def _count_empty(self, window: Window) -> None:
        if not len(window.ranges):
            self.empty_windows += 1
            self.dropped.update(cause for cause, *_ in window.bad)
            self.last_dropped = window.bad[-1] if window.bad else self.last_dropped

    def load_window(self) -> None:
        position = (self.epoch, self.window)
        if self.prefetched is not None and self.prefetched[0] == position:
            self.current = self.prefetched[1].result()
        else:
            self.current = self.plan(*position)
        self.prefetched = None
        following = self.following(*position)
        if not self.config.epochs or following[0] < self.config.epochs:
            self.prefetched = (following, self.pool.submit(self.plan, *following))


class BatchSampler:
    """Distributes the mixture's global batches over the ranks, and keeps the cursor.

    The next batch comes from the part with the smallest (delivered + 1/2) / weight (Webster's
    apportionment: shares stay within about one batch of the weights). ``step`` returns this rank's
    `Task` of the next W global batches, or None at the end of a finite stream; every rank gets the
    same number of tasks. ``state()`` is the cursor after the last step, equal on all ranks.
    """

    def __init__(
        self,
        parts: Sequence[DatasetPart],
        config: PlanConfig,
        load: Callable[[str], ShardIndex],
        *,
        rank: int = 0,
        world: int = 1,
        lengths: AugmentedDurations | None = None,
        state: dict | None = None,
    ) -> None:
        if not 0 <= rank < world:
            raise UserError(f"rank {rank} does not exist in a world of {world}")
        if not parts:
            raise UserError("the stream has no datasets: name at least one")
        names = [part.name for part in parts]
        if len(set(names)) < len(names):
            raise UserError(f"dataset names must differ: {', '.join(names)}")
        for part in parts:
            if not part.weight > 0:
                raise UserError(f"the weight of dataset '{part.name}' must be positive")
        self.config, self.rank, self.world = config, rank, world
        self.number = 0
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="dsasr-plan")
        self.cursors = [PartCursor(part, config, load, lengths, self.pool) for part in parts]
        plan = [config.seed, config.shuffle, config.window, config.window_samples]
        probe = np.full(64, 1.0), splitmix64(np.arange(64, dtype=np.uint64))
        plan.append(lengths(*probe).tolist() if lengths is not None else None)
        self.identity = {
            "plan": f"{stable_hash(*plan, vars(config.batch)):x}",
            "parts": {part.name: part.fingerprint() for part in parts},
            "contents": {part.name: part.content() for part in parts},
        }
        if state is not None:
            self.load_state(state)

    def load_state(self, state: dict) -> None:
        if state.get("version") != STATE_VERSION:
            raise UserError(
                f"the stream's state has version {state.get('version')}, not {STATE_VERSION}: "
                "resume with the release that wrote it"
            )
        saved = state["identity"]
        for name in sorted(set(saved["parts"]) | set(self.identity["parts"])):
            if saved["parts"].get(name) != self.identity["parts"].get(name):
                raise UserError(
                    f"dataset '{name}' is not the one that the checkpoint was reading (its shard "
                    "list changed): restore it, or start the stage without the loader's state"
                )
        # An older release's state has no contents, and of remote tars none are known.
        for name, content in saved.get("contents", {}).items():
            if content and self.identity["contents"].get(name) not in ("", content):
                raise UserError(
                    f"dataset '{name}' is not the one that the checkpoint was reading (its shards "
                    "have other sizes: they were packed again under the same names): restore it, "
                    "or start the stage without the loader's state"
                )
        if saved["plan"] != self.identity["plan"]:
            raise UserError(
                "seed, batch budgets, window or augmentation differ from the checkpoint's: restore "
                "them, or start the stage without the loader's state"
            )
        self.number = int(state["number"])
        for cursor in self.cursors:
            cursor.epoch, cursor.window, cursor.batch, cursor.delivered = state["cursors"][
                cursor.part.name
            ]

    def state(self) -> dict:
        """The cursor after the last step; JSON-able, a few hundred bytes."""
        return {
            "version": STATE_VERSION,
            "number": self.number,
            "identity": self.identity,
            "cursors": {
                c.part.name: [c.epoch, c.window, c.batch, c.delivered] for c in self.cursors
            },
        }

    def advance(self, build: bool) -> Task | None:
        """Move past one global batch; its `Task` if ``build``. None at the end, too."""
        unfinished = [cursor for cursor in self.cursors if cursor.seek()]
        if not unfinished:
            return None
        cursor = min(unfinished, key=lambda c: (c.delivered + 0.5) / c.part.weight)
        task = None
        if build:
            window = cursor.current
            seed = stable_hash("batch", self.config.seed, self.number)
            bad = tuple(window.bad) if cursor.batch == 0 else ()
            samples = window.samples(cursor.batch)
            task = Task(self.number, cursor.epoch, cursor.part.name, seed, samples, bad)
        cursor.batch += 1
        cursor.delivered += 1
        self.number += 1
        return task

    def step(self) -> Task | None:
        """This rank's share of the next W global batches."""
        first, task = self.number, None
        for rank in range(self.world):
            task = self.advance(build=rank == self.rank) or task
        if self.number == first:
            return None
        if task is None:
            number = first + self.rank
            task = Task(number, max(self.config.epochs - 1, 0), "", stable_hash("fill", number), ())
        return task

    def __iter__(self) -> Iterator[Task]:
        while (task := self.step()) is not None:
            yield task

    def close(self) -> None:
        self.pool.shutdown(wait=True, cancel_futures=True)
