"""Drills for the stream: drawn shards, ranks, workers, kills and new world sizes, checked exactly.

Every case writes a small corpus, takes the uninterrupted one-rank stream as the reference for the
batches, and the plain list of keys as the reference for the samples. Then it runs the same stream
through a drawn history (world sizes, workers, kill points) and compares batch by batch, bit by bit.
"""

from __future__ import annotations

import hashlib
import io
import json
import multiprocessing
import os
import signal
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import soundfile
import torch

from dsasr.data.audio.augment import AugmentConfig
from dsasr.data.audio.features import FbankConfig
from dsasr.data.batch import Batch
from dsasr.data.dataloader.bucketing import BatchConfig
from dsasr.data.dataloader.dataloader import DataLoaderConfig, DatasetConfig, StreamingDataLoader
from dsasr.data.shards.storage import SourceConfig

RATE = 16_000
EPOCHS = 2  # whole epochs that a case covers, at least
GIVE_UP = 4000  # steps


@dataclass(frozen=True)
class Leg:
    """A stretch of a run: so many ranks and workers, ended after ``steps``.

    ``end``: the consumer stops ("close"), is killed with SIGKILL ("consumer"), or loses a worker to
    SIGKILL half-way and goes on ("worker"). ``lost``: steps after the last checkpoint, which the
    next leg makes again.
    """

    world: int
    workers: int
    steps: int
    lost: int
    end: str


@dataclass
class Case:
    """One drawn corpus, stream and history."""

    seed: int
    shards: dict[str, list[int]]  # dataset → samples of each shard
    weights: list[float]
    frames: int
    window: int
    augment: bool
    finite: bool
    legs: list[Leg]


@dataclass
class Verdict:
    """What was wrong, summed over cases. All zero is right."""

    cases: int = 0
    batches: int = 0
    samples: int = 0
    killed_workers: int = 0
    killed_consumers: int = 0
    missing: int = 0
    repeated: int = 0
    mismatched: int = 0
    uneven: int = 0  # steps that not all ranks made
    failed: list[int] = field(default_factory=list)  # seeds of the cases that were wrong

    @property
    def clean(self) -> bool:
        return not (self.missing or self.repeated or self.mismatched or self.uneven or self.failed)


def draw_case(seed: int) -> Case:
    """A case from its number: mostly small and odd, which is where such things break."""
    rng = np.random.default_rng([seed, 77])
    shards = {}
    for name in ("a", "b")[: 1 + int(rng.random() < 0.3)]:
        count = int(rng.integers(1, 7))
        sizes = [int(n) for n in rng.choice([0, 1, 1, 2, 3, 5, 8, 13], count)]
        shards[name] = sizes if sum(sizes) else [1]
    finite = bool(rng.random() < 0.25)
    legs = []
    for _ in range(int(rng.integers(1, 4))):
        steps = int(rng.integers(1, 7))
        end = str(rng.choice(["close", "close", "worker", "consumer"]))
        workers = int(rng.choice([0, 1, 2])) if end == "close" else int(rng.choice([1, 2]))
        legs.append(Leg(int(rng.integers(1, 5)), workers, steps, int(rng.integers(0, steps)), end))
    legs.append(Leg(int(rng.integers(1, 5)), int(rng.choice([0, 0, 1])), GIVE_UP, 0, "close"))
    return Case(
        seed=seed,
        shards=shards,
        weights=[float(w) for w in rng.uniform(0.5, 3.0, len(shards))],
        frames=int(rng.choice([60, 150, 400])),
        window=int(rng.integers(1, 4)),
        augment=bool(rng.random() < 0.5),
        finite=finite,
        legs=legs,
    )


def write_corpus(case: Case, folder: Path) -> dict[str, list[str]]:
    """The case's shards under ``folder``/dataset; returns each dataset's keys."""
    rng = np.random.default_rng([case.seed, 78])
    keys: dict[str, list[str]] = {}
    for name, sizes in case.shards.items():
        keys[name] = []
        (folder / name).mkdir(parents=True)
        for number, size in enumerate(sizes):
            with tarfile.open(folder / name / f"{name}-{number:03d}.tar", "w") as tar:
                for _ in range(size):
                    key = f"{name}{len(keys[name]):04d}"
                    keys[name].append(key)
                    _add_sample(tar, key, rng)
    return keys


def _add_sample(tar: tarfile.TarFile, key: str, rng: np.random.Generator) -> None:
    wave = (rng.standard_normal(int(rng.integers(1800, 7000))) * 3000).astype(np.int16)
    buffer = io.BytesIO()
    soundfile.write(buffer, wave, RATE, format="WAV", subtype="PCM_16")
    words = "w " * int(rng.integers(1, 6))
    meta = {"text": words + key, "lang": "en", "speaker": "s", "duration": len(wave) / RATE}
    for extension, data in (("wav", buffer.getvalue()), ("json", json.dumps(meta).encode())):
        info = tarfile.TarInfo(f"{key}.{extension}")
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))


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
        source=SourceConfig(cache=str(folder / "cache")),
    )
    return StreamingDataLoader(
        config,
        datasets=[
            DatasetConfig(name, str(folder / name / "*.tar"), weight=weight)
            for name, weight in zip(case.shards, case.weights, strict=True)
        ],
        fbank=FbankConfig(),
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
    total.update(json.dumps([batch.keys, batch.texts, batch.bad, batch.seed, batch.epoch]).encode())
    return total.hexdigest()


@dataclass
class Seen:
    """One delivered batch, as far as the check needs it."""

    number: int
    dataset_epoch: int
    keys: tuple[str, ...]
    digest: str


def _seen(batch: Batch) -> Seen:
    # A sample that was dropped and named is accounted for.
    keys = batch.keys + tuple(key for _, _, key, _ in batch.bad)
    return Seen(batch.number, batch.epoch, keys, digest(batch))


def _covered(batches: list[Seen], keys: dict[str, list[str]]) -> bool:
    """Whether every sample came often enough."""
    counts = Counter(key for seen in batches for key in seen.keys)
    return all(counts[key] >= EPOCHS for held in keys.values() for key in held)


def reference(case: Case, folder: Path, keys: dict[str, list[str]]) -> list[Seen]:
    """The batches of one rank without workers, uninterrupted: two epochs, or a finite stream."""
    batches: list[Seen] = []
    with open_stream(case, folder, 0, 1, 0, None) as stream:
        for batch in stream:
            batches.append(_seen(batch))
            if not case.finite and _covered(batches, keys):
                break
    return batches


def _rows(
    case: Case, folder: Path, leg: Leg, state: dict | None, kill: bool
) -> Iterator[tuple[list[Seen | None], dict, int]]:
    """A leg's steps: every rank's batch, the state, workers killed so far."""
    streams = [
        open_stream(case, folder, rank, leg.world, leg.workers, state) for rank in range(leg.world)
    ]
    killed = 0
    try:
        for step in range(leg.steps):
            row = [next(stream, None) for stream in streams]
            if all(batch is None for batch in row):
                return
            states = [stream.state() for stream in streams]
            yield (
                [None if batch is None else _seen(batch) for batch in row],
                states[0] if all(s == states[0] for s in states) else {},
                killed,
            )
            if kill and step == leg.steps // 2:
                for stream in streams:
                    os.kill(stream.pool.pids()[step % leg.workers], signal.SIGKILL)
                    killed += 1
    finally:
        for stream in streams:
            stream.close()


def _consume(case: Case, folder: Path, leg: Leg, state: dict | None, out) -> None:
    """The body of a consumer that will be killed: report each step, then wait for the end."""
    torch.set_num_threads(1)
    for row in _rows(case, folder, replace(leg, steps=GIVE_UP), state, False):
        out.send(row)
    out.send(None)
    signal.pause()


def _killed_rows(
    case: Case, folder: Path, leg: Leg, state: dict | None
) -> Iterator[tuple[list[Seen | None], dict, int]]:
    """The steps of a consumer process that is killed while it makes the next ones."""
    context = multiprocessing.get_context("fork")
    theirs, ours = context.Pipe()
    process = context.Process(target=_consume, args=(case, folder, leg, state, theirs))
    process.start()
    theirs.close()
    try:
        for _ in range(leg.steps):
            row = ours.recv()
            if row is None:
                return
            yield row
    finally:
        process.kill()
        process.join()
        ours.close()


def run_case(case: Case, folder: Path, verdict: Verdict) -> None:
    """Run a case's history and add what was wrong to ``verdict``."""
    keys = write_corpus(case, folder)
    want = reference(case, folder, keys)
    history: list[Seen] = []
    state, before = None, (verdict.missing, verdict.repeated, verdict.mismatched, verdict.uneven)
    for number, leg in enumerate(case.legs):
        kept: list[tuple[list[Seen | None], dict]] = []
        if leg.end == "consumer":
            rows = _killed_rows(case, folder, leg, state)
            verdict.killed_consumers += 1
        else:
            rows = _rows(case, folder, leg, state, leg.end == "worker")
        killed, last = 0, number == len(case.legs) - 1
        for row, after, gone in rows:
            killed = gone
            kept.append((row, after))
            held = len(history) + sum(len(r) for r, _ in kept)
            if last and not case.finite and held >= len(want):
                break
        if isinstance(rows, Iterator) and hasattr(rows, "close"):
            rows.close()
        verdict.killed_workers += killed
        if not last and len(kept) > leg.lost:
            kept = kept[: len(kept) - leg.lost]
        for row, after in kept:
            verdict.uneven += sum(seen is None for seen in row) + (not after)
            history += [seen for seen in row if seen is not None]
            state = json.loads(json.dumps(after))
    _compare(case, keys, want, history, verdict)
    after = (verdict.missing, verdict.repeated, verdict.mismatched, verdict.uneven)
    verdict.cases += 1
    verdict.batches += len(history)
    verdict.samples += sum(len(seen.keys) for seen in history)
    if after != before:
        verdict.failed.append(case.seed)


def _compare(
    case: Case, keys: dict[str, list[str]], want: list[Seen], history: list[Seen], verdict: Verdict
) -> None:
    numbers = Counter(seen.number for seen in history)
    verdict.repeated += sum(count - 1 for count in numbers.values())
    verdict.missing += sum(number not in numbers for number in range(max(numbers, default=-1) + 1))
    expected = {seen.number: seen.digest for seen in want}
    for seen in history:
        if seen.number in expected:
            verdict.mismatched += seen.digest != expected[seen.number]
        elif case.finite:
            verdict.repeated += len(seen.keys)  # filler holds no samples
    # The plain list of keys, epoch by epoch: every epoch that was finished is whole.
    epochs: dict[tuple[str, int], Counter] = {}
    for seen in history:
        for key in seen.keys:
            epochs.setdefault((key[0], seen.dataset_epoch), Counter())[key] += 1
    for name, held in keys.items():
        latest = max(epoch for dataset, epoch in epochs if dataset == name)
        finished = latest + 1 if case.finite else latest
        for epoch in range(finished):
            counts = epochs.get((name, epoch), Counter())
            verdict.missing += sum(counts[key] == 0 for key in held)
            verdict.repeated += sum(count - 1 for count in counts.values() if count > 1)
            verdict.repeated += len(set(counts) - set(held))
