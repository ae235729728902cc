"""The first samples of each dataset, read as training will read them: before a run begins.

Limits that leave out everything, transcripts that no phonemizer reads and shards of another kind
are reported with their causes, not by a training without samples.
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from dsasr.build import Builder
from dsasr.data.dataloader.bad_samples import dropped_summary
from dsasr.data.dataloader.bucketing import BatchConfig
from dsasr.data.dataloader.collate import Collator
from dsasr.data.dataloader.dataloader import DatasetConfig, build_dataset_parts
from dsasr.data.dataloader.window_plan import DatasetPart, PlanConfig, Task, Window, plan_window
from dsasr.data.dataloader.workers import run_inline
from dsasr.data.shards.index_cache import load_or_build_index
from dsasr.data.shards.sample import DroppedSample
from dsasr.data.shards.storage import ShardReadError
from dsasr.training import phoneme_fit
from dsasr.utils.errors import UserError

SHARDS = 8  # of a dataset that are looked at until a sample is usable, evenly spread
SAMPLES = 8  # of such a shard


class Reading(NamedTuple):
    """How a job reads a dataset: for which branch, within which limits."""

    kind: str  # train or valid
    dataset: DatasetConfig
    branch: str
    batch: BatchConfig

    @property
    def where(self) -> str:
        return f"data.{self.kind}.{self.dataset.name}"

    def collator(self, builder: Builder) -> Collator:
        return builder.collator(self.branch, self.batch, trains=self.kind == "train")


def readings(builder: Builder) -> list[Reading]:
    """All that this job does, each once, in order."""
    recipe = builder.recipe
    found: dict[Reading, None] = {}
    for stage in recipe.stages:
        if stage.branch in recipe.branches and not stage.text_only:
            loader, datasets = recipe.dataloader(stage)
            found |= {Reading("train", d, stage.branch, loader.batch): None for d in datasets}
    for branch in recipe.branches:
        for dataset in recipe.data.valid:
            found[Reading("valid", dataset, branch, recipe.data.dataloader.batch)] = None
    return list(found)


def check(builder: Builder) -> None:
    """Raise `UserError` for a dataset of which no sample is usable where this job reads it.

    A dataset passes with its first usable sample.
    """
    for reading in readings(builder):
        collator = reading.collator(builder)
        try:
            _check_dataset(builder, collator, reading.where, reading.dataset, reading.batch)
        except ShardReadError as error:
            raise UserError(f"{reading.where}: {error}") from None
        finally:
            collator.storage.close()


def _check_dataset(
    builder: Builder, collator: Collator, where: str, dataset: DatasetConfig, batch: BatchConfig
) -> None:
    dropped: dict[tuple[str, str], DroppedSample] = {}
    storage, temperature = collator.storage, builder.recipe.data.dataloader.temperature
    for part in build_dataset_parts((dataset,), storage, temperature):
        step = max(1, -(-len(part.shards) // SHARDS))
        for shard in part.shards[::step]:
            window = _window(part, shard, load_or_build_index(storage, shard), batch)
            dropped |= {row[1:3]: row for row in window.bad}
            for task in _tasks(window):
                rest = run_inline(collator.collate, task).rest
                if rest.keys:
                    if collator.text.phonemizer is not None:
                        phoneme_fit.check(builder, storage, where, part)
                    return
                dropped |= {row[1:3]: row for row in rest.bad}
    if dropped:
        counts = Counter(cause for cause, *_ in dropped.values())
        last = next(reversed(dropped.values()))
        raise UserError(f"{where}: no usable sample{dropped_summary(counts, last)}")
    if dataset.lang is None:
        raise UserError(f"{where}: no usable sample{dropped_summary({}, None)}")


def _window(part: DatasetPart, shard: str, index, batch: BatchConfig) -> Window:
    return plan_window(part, 0, 0, [shard], [index], PlanConfig(batch, shuffle=False), None)


def _tasks(window: Window):
    """Tasks of single samples, evenly over the window."""
    planned = [sample for number in range(len(window.ranges)) for sample in window.samples(number)]
    for sample in planned[:: max(1, -(-len(planned) // SAMPLES))]:
        yield Task(0, 0, "", 0, (sample,))
