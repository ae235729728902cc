"""A survey of the datasets, for ``dsasr train --check``: lengths and limits from indexes, and some
samples of each set read end to end, as training will read them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from dsasr.build import Builder
from dsasr.data.audio.decoding import decode
from dsasr.data.audio.files import AudioError
from dsasr.data.audio.measure import AudioMeasures, measure_audio
from dsasr.data.dataloader.collate import Collator
from dsasr.data.dataloader.dataloader import build_dataset_parts
from dsasr.data.dataloader.window_plan import (
    DatasetPart,
    PlanConfig,
    PlannedSample,
    Task,
    plan_window,
)
from dsasr.data.dataloader.workers import run_inline
from dsasr.data.shards.index_cache import load_or_build_index
from dsasr.data.shards.sample import BadSample, DroppedSample, parse_sample
from dsasr.data.shards.storage import ShardReadError, ShardStorage, ShardTruncated
from dsasr.training.first_samples import Reading, readings
from dsasr.utils.errors import UserError
from dsasr.utils.progress import Bar

SHARDS = 8  # of a dataset that are looked at, evenly spread
SAMPLES = 50  # of a dataset that are read, evenly over those


@dataclass(frozen=True)
class SurveyedSample:
    """A usable sample: as it is stored, and what the branch learns of it."""

    key: str
    lang: str
    seconds: float
    stored: str  # the transcript of the shard
    written: str  # the one that is trained on
    units: tuple[int, ...]  # of the CTC head; empty where the branch has none
    tokens: tuple[int, ...]  # of the language model, with the end
    encoder_frames: int
    audio: AudioMeasures


@dataclass
class SetSurvey:
    """A dataset as one branch reads it, within the limits that leave out the most."""

    reading: Reading
    utterances: int = 0  # of all shards
    hours: float = 0.0
    exact: bool = True  # False: both are estimated from the shards that were looked at
    # Of the shards that were looked at, before any limit:
    seconds: np.ndarray = field(default_factory=lambda: np.zeros(0))
    chars: np.ndarray = field(default_factory=lambda: np.zeros(0))
    langs: Counter[str] = field(default_factory=Counter)
    identities: set[tuple] = field(default_factory=set)
    left_out: Counter[str] = field(default_factory=Counter)  # by cause: limits, damaged members
    # Of the samples that were read:
    read: int = 0
    samples: list[SurveyedSample] = field(default_factory=list)
    dropped: list[DroppedSample] = field(default_factory=list)

    @property
    def indexed(self) -> int:
        return len(self.seconds)


def survey(builder: Builder) -> list[SetSurvey]:
    """The survey of every set that this job reads, of each branch. Raises `UserError`."""
    found: dict[tuple[str, str, str], SetSurvey] = {}
    for reading in readings(builder):
        new = SetSurvey(reading)
        with _Source(builder, reading) as source:
            for part in source.parts():
                _index(source, part, new)
        key = reading.kind, reading.dataset.name, reading.branch
        if key not in found or new.left_out.total() > found[key].left_out.total():
            found[key] = new
    total = sum(min(SAMPLES, s.indexed) for s in found.values())
    with Bar(total=total, desc="reading samples", unit="sample", delay=3, leave=False) as bar:
        surveyed: dict[tuple[str, str], dict[tuple, SurveyedSample]] = {}
        for (kind, name, _), row in found.items():
            with _Source(builder, row.reading) as source:
                _read(source, row, surveyed.setdefault((kind, name), {}), bar)
    return list(found.values())


class _Source:
    """A dataset's shards, and what reads their samples; closed at the end."""

    def __init__(self, builder: Builder, reading: Reading):
        self.builder, self.reading = builder, reading
        self.collator: Collator = reading.collator(builder)

    @property
    def storage(self) -> ShardStorage:
        return self.collator.storage

    def __enter__(self) -> _Source:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self.storage.close()
        if isinstance(error, ShardReadError):
            raise UserError(f"{self.reading.where}: {error}") from None

    def parts(self) -> list[DatasetPart]:
        temperature = self.builder.recipe.data.dataloader.temperature
        return build_dataset_parts((self.reading.dataset,), self.storage, temperature)

    def windows(self, part: DatasetPart) -> Iterator[tuple]:
        """(index, window) of up to `SHARDS` shards."""
        step = max(1, -(-len(part.shards) // SHARDS))
        plan = PlanConfig(self.reading.batch, shuffle=False)
        for shard in part.shards[::step]:
            index = load_or_build_index(self.storage, shard)
            yield index, plan_window(part, 0, 0, [shard], [index], plan, None)


def _index(source: _Source, part: DatasetPart, into: SetSurvey) -> None:
    """Add what the indexes say of ``part``."""
    seconds, chars, shards = [], [], 0
    for index, window in source.windows(part):
        keep = slice(None) if part.lang is None else index.lang_mask(part.lang)
        seconds.append(index.durations[keep].astype(np.float64))
        chars.append(index.chars[keep])
        rows = np.arange(len(index))[keep].tolist()
        for entry in map(index.entry, rows):
            into.langs[entry.lang] += 1
            into.identities.add((entry.key, round(entry.duration, 3), entry.chars))
        into.left_out.update(cause for cause, *_ in window.bad)
        shards += 1
    looked_at = sum(map(len, seconds))
    into.seconds = np.concatenate((into.seconds, *seconds))
    into.chars = np.concatenate((into.chars, *chars))
    if shards == len(part.shards):
        into.utterances += looked_at
        into.hours += sum(s.sum() for s in seconds) / 3600
        return
    into.exact = False
    whole = len(part.shards) / shards * looked_at
    if part.counts is not None and part.lang is None:
        whole, into.exact = float(np.sum(part.counts)), True
    into.utterances += round(whole)
    into.hours += whole * float(np.mean(np.concatenate(seconds) if looked_at else 0)) / 3600


def _read(source: _Source, row: SetSurvey, surveyed: dict, bar: Bar) -> None:
    """``surveyed``: (shard, key) → what another branch has read of the same set."""
    parts = source.parts()
    for part in parts:
        shards = min(SHARDS, len(part.shards))
        most = -(-SAMPLES // (shards * len(parts)))
        for _, window in source.windows(part):
            planned = [s for i in range(len(window.ranges)) for s in window.samples(i)]
            for number in np.linspace(0, len(planned) - 1, min(most, len(planned))):
                _read_sample(source, planned[round(number)], row, surveyed)
                bar.update()


def _read_sample(
    source: _Source, planned: PlannedSample, row: SetSurvey, surveyed: dict[tuple, SurveyedSample]
) -> None:
    row.read += 1
    known = surveyed.get((planned.shard, planned.entry.key))
    if known is not None and row.reading.branch == "sft":  # only its labels are others
        try:
            row.samples.append(_relabeled(source, planned, known))
        except BadSample as error:
            row.dropped.append(error.record)
        return
    rest = run_inline(source.collator.collate, Task(0, 0, "", 0, (planned,))).rest
    if not rest.keys:
        row.dropped += rest.bad
        return
    entry, shard = planned.entry, planned.shard
    try:
        spans = (entry.audio_offset, entry.audio_size), (entry.json_offset, entry.json_size)
        audio, labels = source.storage.read_two(shard, *spans)
        stored = parse_sample(entry, shard, audio, labels)
        rate = source.collator.front_end.rate
        wave = decode(audio, rate=rate, max_seconds=row.reading.batch.max_seconds)
    except (BadSample, ShardTruncated, AudioError):  # it was there a moment ago
        return
    frames = source.collator.front_end.frames(len(wave))
    encoder_frames = source.builder.encoder_shape.output_lengths(torch.tensor(frames))
    found = SurveyedSample(
        key=entry.key,
        lang=stored.lang,
        seconds=rest.durations[0],
        stored=stored.text,
        written=rest.texts[0],
        units=tuple(rest.phonemes[0].tolist()),
        tokens=tuple(rest.tokens[0].tolist()),
        encoder_frames=int(encoder_frames),
        audio=measure_audio(wave, rate),
    )
    row.samples.append(found)
    surveyed[shard, entry.key] = found


def _relabeled(source: _Source, planned: PlannedSample, known: SurveyedSample) -> SurveyedSample:
    """``known`` with the labels of another branch. Raises `BadSample`."""
    entry = planned.entry
    data = source.storage.read(planned.shard, entry.json_offset, entry.json_size)
    sample = parse_sample(entry, planned.shard, b"", data)
    written, units, tokens = source.collator.text.encode(sample)
    return replace(known, written=written, units=tuple(units), tokens=tuple(tokens))


def utterance(surveys: Sequence[SetSurvey]) -> tuple[float, float]:
    """(seconds of the average utterance of training, its tokens a second); 0: not known."""
    training = [row for row in surveys if row.reading.kind == "train"]
    seconds = np.concatenate([row.seconds for row in training])
    samples = [sample for row in training for sample in row.samples if sample.tokens]
    spoken = sum(sample.seconds for sample in samples)
    tokens = sum(len(sample.tokens) for sample in samples)
    return float(seconds.mean()) if len(seconds) else 0.0, tokens / spoken if spoken else 0.0
