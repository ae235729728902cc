"""Fuzzing of the dataloader: random shards, ranks, workers, kills and changes of world size.

Each case writes a small corpus. The reference for the batches is an uninterrupted stream of one
rank, the reference for the samples is the list of keys. Then the case runs the same stream through
a random history (world sizes, workers, kills) and compares it batch by batch, bit by bit:
"Exactly once" and "Interrupted is uninterrupted".
"""

from __future__ import annotations

import hashlib
import io
import json
import multiprocessing
import os
import signal
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import soundfile
import torch

from dsasr.data.audio.augment import AugmentConfig
from dsasr.data.batch import Batch
from dsasr.data.dataloader.bucketing import BatchConfig
from dsasr.data.dataloader.dataloader import DataLoaderConfig, DatasetConfig, StreamingDataLoader
from dsasr.data.dataloader.text_encoder import TextEncoder
from dsasr.data.shards.storage import StorageConfig
from dsasr.data.shards.writer import PackedSample, write_tar

RATE = 16_000
MIN_EPOCHS = 2  # whole epochs that a case covers
MAX_STEPS = 4000


@dataclass(frozen=True)
class Segment:
    """A segment of a run: ``world`` ranks with ``workers`` each, ended after ``steps``.

    ``end``: the consumer stops ("close"), is killed by SIGKILL ("consumer"), or loses a worker to
    SIGKILL half-way and continues ("worker"). ``lost``: steps after the last checkpoint, which the
    next segment repeats.
    """

    world: int
    workers: int
    steps: int
    lost: int
    end: str


@dataclass
class Case:
    """A random corpus, stream and history."""

    seed: int
    shards: dict[str, list[int]]  # dataset → samples of each shard
    weights: list[float]
    frames: int
    window: int
    augment: bool
    finite: bool
    segments: list[Segment]


@dataclass
class FuzzReport:
    """Errors and counts, summed over cases."""

    cases: int = 0
    batches: int = 0
    samples: int = 0
    killed_workers: int = 0
    killed_consumers: int = 0
    missing: int = 0
    repeated: int = 0
    mismatched: int = 0
    uneven: int = 0  # steps without a batch of every rank
    failed: list[int] = field(default_factory=list)  # seeds of the cases with errors

    @property
    def clean(self) -> bool:
        return not (self.missing or self.repeated or self.mismatched or self.uneven or self.failed)


def draw_case(seed: int) -> Case:
    """A case from its number: mostly small and odd, where errors are most likely."""
    rng = np.random.default_rng([seed, 77])
    shards = {}
    for name in ("a", "b")[: 1 + int(rng.random() < 0.3)]:
        count = int(rng.integers(1, 7))
        sizes = [int(n) for n in rng.choice([0, 1, 1, 2, 3, 5, 8, 13], count)]
        shards[name] = sizes if sum(sizes) else [1]
    finite = bool(rng.random() < 0.25)
    segments = []
    for _ in range(int(rng.integers(1, 4))):
        steps = int(rng.integers(1, 7))
        end = str(rng.choice(["close", "close", "worker", "consumer"]))
        workers = int(rng.choice([0, 1, 2])) if end == "close" else int(rng.choice([1, 2]))
        segments.append(
            Segment(int(rng.integers(1, 5)), workers, steps, int(rng.integers(0, steps)), end)
        )
    segments.append(
        Segment(int(rng.integers(1, 5)), int(rng.choice([0, 0, 1])), MAX_STEPS, 0, "close")
    )
    return Case(
        seed=seed,
        shards=shards,
        weights=[float(w) for w in rng.uniform(0.5, 3.0, len(shards))],
        frames=int(rng.choice([60, 150, 400])),
        window=int(rng.integers(1, 4)),
        augment=bool(rng.random() < 0.5),
        finite=finite,
        segments=segments,
    )


def write_corpus(case: Case, folder: Path) -> dict[str, list[str]]:
    """The case's shards under ``folder``/dataset; returns each dataset's keys."""
    rng = np.random.default_rng([case.seed, 78])
    keys: dict[str, list[str]] = {}
    for name, sizes in case.shards.items():
        keys[name] = []
        (folder / name).mkdir(parents=True)
        for number, size in enumerate(sizes):
            first = len(keys[name])
            shard = [f"{name}{first + i:04d}" for i in range(size)]
            keys[name] += shard
            # Without an index, which the dataloader then builds.
            write_tar(
                folder / name / f"{name}-{number:03d}.tar", [_sample(key, rng) for key in shard]
            )
    return keys


def _sample(key: str, rng: np.random.Generator) -> PackedSample:
    wave = (rng.standard_normal(int(rng.integers(1800, 7000))) * 3000).astype(np.int16)
    buffer = io.BytesIO()
    soundfile.write(buffer, wave, RATE, format="WAV", subtype="PCM_16")
    words = "w " * int(rng.integers(1, 6))
    values = {"text": words + key, "lang": "en", "speaker": "s", "duration": len(wave) / RATE}
    return PackedSample(key, "wav", buffer.getvalue(), values)


def open_stream(
    case: Case, folder: Path, rank: int, world: int, workers: int, state: dict | None
) -> StreamingDataLoader:
    """One rank's stream over the case's corpus."""
    config = DataLoaderConfig(
        batch=BatchConfig(frames=case.frames, samples=6, min_seconds=0.0),
        num_workers=workers,
        prefetch=2,
        window=case.window,
        window_samples=1,
        source=StorageConfig(cache=str(folder / "cache")),
    )
    return StreamingDataLoader(
        config,
        datasets=[
            DatasetConfig(name, str(folder / name / "*.tar"), weight=weight)
            for name, weight in zip(case.shards, case.weights, strict=True)
        ],
        text=TextEncoder(languages=("en",), language_share=0.5),
        augment=AugmentConfig(noise_share=0.5) if case.augment else None,
        seed=case.seed,
        rank=rank,
        world=world,
        state=state,
        purpose="train",
        epochs=1 if case.finite else 0,
    )


def digest(batch: Batch) -> str:
    """A hash of everything in a batch that training sees."""
    total = hashlib.blake2b(digest_size=16)
    for tensor in (batch.features_BTF, batch.feature_lengths_B, batch.tokens_BU, batch.phonemes_BP):
        total.update(repr(tuple(tensor.shape)).encode())
        total.update(tensor.contiguous().numpy().tobytes())
    plain = [batch.keys, batch.texts, batch.hints, batch.bad, batch.seed, batch.epoch]
    total.update(json.dumps(plain).encode())
    return total.hexdigest()


@dataclass
class DeliveredBatch:
    """What the comparison needs of a delivered batch."""

    number: int
    dataset_epoch: int
    keys: tuple[str, ...]
    digest: str


def _delivered(batch: Batch) -> DeliveredBatch:
    # A sample that is dropped and named counts as delivered.
    keys = batch.keys + tuple(key for _, _, key, _ in batch.bad)
    return DeliveredBatch(batch.number, batch.epoch, keys, digest(batch))


def _covered(batches: list[DeliveredBatch], keys: dict[str, list[str]]) -> bool:
    """Whether every sample was delivered `MIN_EPOCHS` times."""
    counts = Counter(key for batch in batches for key in batch.keys)
    return all(counts[key] >= MIN_EPOCHS for names in keys.values() for key in names)


def reference(case: Case, folder: Path, keys: dict[str, list[str]]) -> list[DeliveredBatch]:
    """The batches of one rank without workers, uninterrupted: two epochs, or a finite stream."""
    batches: list[DeliveredBatch] = []
    with open_stream(case, folder, 0, 1, 0, None) as stream:
        for batch in stream:
            batches.append(_delivered(batch))
            if not case.finite and _covered(batches, keys):
                break
    return batches


def _steps(
    case: Case, folder: Path, segment: Segment, state: dict | None, kill: bool
) -> Iterator[tuple[list[DeliveredBatch | None], dict, int]]:
    """A segment's steps: every rank's batch, the state, the number of workers killed so far."""
    streams = [
        open_stream(case, folder, rank, segment.world, segment.workers, state)
        for rank in range(segment.world)
    ]
    killed = 0
    try:
        for step in range(segment.steps):
            row = [next(stream, None) for stream in streams]
            if all(batch is None for batch in row):
                return
            states = [stream.state() for stream in streams]
            yield (
                [None if batch is None else _delivered(batch) for batch in row],
                states[0] if all(s == states[0] for s in states) else {},
                killed,
            )
            if kill and step == segment.steps // 2:
                for stream in streams:
                    os.kill(stream.pool.pids()[step % segment.workers], signal.SIGKILL)
                    killed += 1
    finally:
        for stream in streams:
            stream.close()


def _consume(case: Case, folder: Path, segment: Segment, state: dict | None, out) -> None:
    """A consumer process that will be killed: sends each step, then waits."""
    torch.set_num_threads(1)
    for row in _steps(case, folder, replace(segment, steps=MAX_STEPS), state, False):
        out.send(row)
    out.send(None)
    signal.pause()


def _steps_until_killed(
    case: Case, folder: Path, segment: Segment, state: dict | None
) -> Iterator[tuple[list[DeliveredBatch | None], dict, int]]:
    """The steps of a consumer process that is killed during a later step."""
    context = multiprocessing.get_context("fork")
    theirs, ours = context.Pipe()
    process = context.Process(target=_consume, args=(case, folder, segment, state, theirs))
    process.start()
    theirs.close()
    try:
        for _ in range(segment.steps):
            row = ours.recv()
            if row is None:
                return
            yield row
    finally:
        process.kill()
        process.join()
        ours.close()


def run_case(case: Case, folder: Path, report: FuzzReport) -> None:
    """Run a case's history and add its errors and counts to ``report``."""
    keys = write_corpus(case, folder)
    expected = reference(case, folder, keys)
    history: list[DeliveredBatch] = []
    state, before = None, _errors(report)
    for number, segment in enumerate(case.segments):
        steps: list[tuple[list[DeliveredBatch | None], dict]] = []
        if segment.end == "consumer":
            rows = _steps_until_killed(case, folder, segment, state)
            report.killed_consumers += 1
        else:
            rows = _steps(case, folder, segment, state, segment.end == "worker")
        killed, last = 0, number == len(case.segments) - 1
        for row, state_after, killed_so_far in rows:
            killed = killed_so_far
            steps.append((row, state_after))
            delivered = len(history) + sum(len(r) for r, _ in steps)
            if last and not case.finite and delivered >= len(expected):
                break
        if isinstance(rows, Iterator) and hasattr(rows, "close"):
            rows.close()
        report.killed_workers += killed
        if not last and len(steps) > segment.lost:
            steps = steps[: len(steps) - segment.lost]
        for row, state_after in steps:
            report.uneven += sum(batch is None for batch in row) + (not state_after)
            history += [batch for batch in row if batch is not None]
            state = json.loads(json.dumps(state_after))
    _compare(case, keys, expected, history, report)
    report.cases += 1
    report.batches += len(history)
    report.samples += sum(len(batch.keys) for batch in history)
    if _errors(report) != before:
        report.failed.append(case.seed)


def _errors(report: FuzzReport) -> tuple[int, ...]:
    return report.missing, report.repeated, report.mismatched, report.uneven


def _compare(
    case: Case,
    keys: dict[str, list[str]],
    expected: list[DeliveredBatch],
    history: list[DeliveredBatch],
    report: FuzzReport,
) -> None:
    numbers = Counter(batch.number for batch in history)
    report.repeated += sum(count - 1 for count in numbers.values())
    report.missing += sum(number not in numbers for number in range(max(numbers, default=-1) + 1))
    digests = {batch.number: batch.digest for batch in expected}
    for batch in history:
        if batch.number in digests:
            report.mismatched += batch.digest != digests[batch.number]
        elif case.finite:
            report.repeated += len(batch.keys)  # filler has no samples
    # Every finished epoch has every key once.
    epochs: dict[tuple[str, int], Counter] = {}
    for batch in history:
        for key in batch.keys:
            epochs.setdefault((key[0], batch.dataset_epoch), Counter())[key] += 1
    for name, names in keys.items():
        latest = max(epoch for dataset, epoch in epochs if dataset == name)
        finished = latest + 1 if case.finite else latest
        for epoch in range(finished):
            counts = epochs.get((name, epoch), Counter())
            report.missing += sum(counts[key] == 0 for key in names)
            report.repeated += sum(count - 1 for count in counts.values() if count > 1)
            report.repeated += len(set(counts) - set(names))
