"""The planner: where a stream stands in its datasets, and which rank gets which batch.

A *step* is W consecutive global batches, one for each of W ranks. Endless streams never end an
epoch early: the tail of one epoch and the head of the next share a step. Finite streams
(``epochs`` > 0) fill their last step with batches that hold no samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from dsasr.data.dataloader.bucketing import (
    Lengths,
    Part,
    PlanConfig,
    Task,
    Window,
    plan_window,
    splitmix64,
    stable_hash,
)
from dsasr.data.shards.index import ShardIndex
from dsasr.utils.errors import UserError

STATE_VERSION = 1


class PartPlan:
    """One part's windows, one after the other, the next one prepared in the background."""

    def __init__(
        self,
        part: Part,
        config: PlanConfig,
        load: Callable[[str], ShardIndex],
        lengths: Lengths | None,
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
        self.upcoming: tuple[tuple[int, int], Future] | None = None
        self.layouts: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self.barren = 0  # windows of the epoch, in a row, without a batch

    def layout(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The epoch's shard order and the windows' edges in it."""
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

    def build(self, epoch: int, number: int) -> Window:
        order, edges = self.layout(epoch)
        shards = [self.part.shards[i] for i in order[edges[number] : edges[number + 1]].tolist()]
        indexes = [self.load(shard) for shard in shards]
        return plan_window(self.part, epoch, number, shards, indexes, self.config, self.lengths)

    def after(self, epoch: int, number: int) -> tuple[int, int]:
        if number + 1 < len(self.layout(epoch)[1]) - 1:
            return epoch, number + 1
        return epoch + 1, 0

    def settle(self) -> bool:
        """Stand on the next batch to deliver, loading windows as needed; False at the end."""
        while True:
            if self.config.epochs and self.epoch >= self.config.epochs:
                return False
            if self.current is None:
                self.open()
            if self.batch < len(self.current):
                self.barren = 0
                return True
            self.barren += not len(self.current)
            following = self.after(self.epoch, self.window)
            if following[0] > self.epoch:
                if self.barren == len(self.layout(self.epoch)[1]) - 1 and not self.config.epochs:
                    where = f" in language '{self.part.lang}'" if self.part.lang else ""
                    raise UserError(f"dataset '{self.part.name}' has no samples{where}")
                self.barren = 0
            (self.epoch, self.window), self.batch, self.current = following, 0, None

    def open(self) -> None:
        place = (self.epoch, self.window)
        if self.upcoming is not None and self.upcoming[0] == place:
            self.current = self.upcoming[1].result()
        else:
            self.current = self.build(*place)
        self.upcoming = None
        following = self.after(*place)
        if not self.config.epochs or following[0] < self.config.epochs:
            self.upcoming = (following, self.pool.submit(self.build, *following))


class BatchSampler:
    """Deals the mixture's global batches to the ranks; keeps the cursor.

    The next batch comes from the part with the smallest (delivered + 1/2) / weight (Webster's
    apportionment: shares stay within about one batch of the weights). ``step`` returns this rank's
    `Task` of the next W global batches, or None at the end of a finite stream; every rank's planner
    returns the same number of tasks. Afterwards ``state()`` is the cursor behind that step,
    equal on all ranks.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        config: PlanConfig,
        load: Callable[[str], ShardIndex],
        *,
        rank: int = 0,
        world: int = 1,
        lengths: Lengths | None = None,
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
        self.parts = [PartPlan(part, config, load, lengths, self.pool) for part in parts]
        plan = [config.seed, config.shuffle, config.window, config.window_samples]
        probe = np.full(64, 1.0), splitmix64(np.arange(64, dtype=np.uint64))
        plan.append(lengths(*probe).tolist() if lengths is not None else None)
        self.identity = {
            "plan": f"{stable_hash(*plan, vars(config.batch)):x}",
            "parts": {part.name: part.fingerprint() for part in parts},
        }
        if state is not None:
            self.restore(state)

    def restore(self, state: dict) -> None:
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
        if saved["plan"] != self.identity["plan"]:
            raise UserError(
                "seed, batch budgets, window or augmentation differ from the checkpoint's: restore "
                "them, or start the stage without the loader's state"
            )
        self.number = int(state["number"])
        cursors = state["cursors"]
        for plan in self.parts:
            plan.epoch, plan.window, plan.batch, plan.delivered = cursors[plan.part.name]

    def state(self) -> dict:
        """The cursor behind the last step; JSON-able, a few hundred bytes."""
        return {
            "version": STATE_VERSION,
            "number": self.number,
            "identity": self.identity,
            "cursors": {p.part.name: [p.epoch, p.window, p.batch, p.delivered] for p in self.parts},
        }

    def advance(self, mine: bool) -> Task | None:
        """Deliver one global batch; a Task if it is ours. None at the end, too."""
        alive = [plan for plan in self.parts if plan.settle()]
        if not alive:
            return None
        plan = min(alive, key=lambda p: (p.delivered + 0.5) / p.part.weight)
        task = None
        if mine:
            window = plan.current
            seed = stable_hash("batch", self.config.seed, self.number)
            bad = tuple(window.bad) if plan.batch == 0 else ()
            samples = window.samples(plan.batch)
            task = Task(self.number, plan.epoch, plan.part.name, seed, samples, bad)
        plan.batch += 1
        plan.delivered += 1
        self.number += 1
        return task

    def step(self) -> Task | None:
        """This rank's share of the next W global batches."""
        first, task = self.number, None
        for rank in range(self.world):
            ours = self.advance(rank == self.rank)
            task = ours or task
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
