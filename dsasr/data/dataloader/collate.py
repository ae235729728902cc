"""Collation: reads, decodes and augments a task's samples, and pads them into a batch's arrays.

Runs in worker processes. All randomness comes from a sample's planned seed, so a sample is the same
in every process and whatever becomes of its neighbors. A bad sample is named with its cause; the
rest of its batch does not change.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dsasr.data.audio.augment import AugmentConfig, AugmentParams, augment_wave
from dsasr.data.audio.decoding import decode
from dsasr.data.audio.files import AudioError, is_silent
from dsasr.data.audio.frontends import FrontEnd
from dsasr.data.audio.resampling import one_thread
from dsasr.data.dataloader.augment_sampler import AugmentParamColumns
from dsasr.data.dataloader.bucketing import FRAMES_PER_SECOND
from dsasr.data.dataloader.text_encoder import TextEncoder
from dsasr.data.dataloader.window_plan import PlannedSample, Task
from dsasr.data.dataloader.workers import Allocate
from dsasr.data.shards.index_cache import load_or_build_index
from dsasr.data.shards.sample import BadSample, DroppedSample, Sample, parse_sample
from dsasr.data.shards.storage import ShardStorage, ShardTruncated

EncoderLengths = Callable[[Tensor], Tensor]
"""Feature frames [B] → encoder frames [B], as an encoder's ``output_lengths``."""

# Frames by which a sample may exceed its plan, as durations and speeds are rounded.
FRAME_SLACK = 10
CHARS_SLACK = 64  # characters by which a text may exceed its index


@dataclass
class CollatedBatch:
    """A collated batch without its features, which travel as an array of their own."""

    lengths: np.ndarray  # [B] frames, or audio samples where features are computed on the device
    phonemes: np.ndarray
    phoneme_lengths: np.ndarray
    tokens: np.ndarray
    token_lengths: np.ndarray
    keys: tuple[str, ...]
    shards: tuple[str, ...]
    texts: tuple[str, ...]
    langs: tuple[str, ...]
    speakers: tuple[str, ...]
    durations: tuple[float, ...]
    hints: tuple[str, ...]
    bad: tuple[DroppedSample, ...]
    stats: dict[str, float]


def pad(rows: Sequence[Sequence[int]], value: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Rows padded on the right [B, longest], and their lengths [B]; int64."""
    lengths = np.array([len(row) for row in rows], np.int64)
    padded = np.full((len(rows), int(lengths.max(initial=0))), value, np.int64)
    for i, row in enumerate(rows):
        padded[i, : len(row)] = row
    return padded, lengths


class _Labels(NamedTuple):
    """A sample, its normalized text, and the ids of phonemes and tokens (`TextEncoder.encode`)."""

    sample: Sample
    text: str
    phonemes: list[int]
    tokens: list[int]


@dataclass
class _CollatedSample:
    """A sample's features and labels. Its encoded audio is dropped, to be reused while cached."""

    key: str
    shard: str
    lang: str
    speaker: str
    hint: str
    features: Tensor  # [T, F] normalized, or audio [n] where features are computed on the device
    seconds: float
    text: str
    phonemes: list[int]
    tokens: list[int]


def _pad_features(samples: list[_CollatedSample], array: np.ndarray) -> np.ndarray:
    """Write the features to ``array`` [B, longest, …], zero padded.

    They may be views of ``array``'s memory, so they are copied first.
    """
    copies = [sample.features.clone() for sample in samples]
    for features, target in zip(copies, torch.from_numpy(array), strict=True):
        target[: len(features)] = features
        target[len(features) :] = 0.0
    return array


def _reshape_memory(array: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """An array of ``shape`` in ``array``'s memory, or in new memory if that is too small."""
    size = int(np.prod(shape))
    flat = array.reshape(-1)[:size] if size <= array.size else np.empty(size, np.float32)
    return flat.reshape(shape)


class Collator:
    """Collates batches from tasks. Forked into the workers; no batch depends on its state."""

    def __init__(
        self,
        *,
        storage: ShardStorage,
        front_end: FrontEnd,
        augment: AugmentConfig | None,
        text: TextEncoder,
        max_seconds: float,
        features_on_device: bool,
        ctc_lengths: EncoderLengths | None = None,
    ) -> None:
        """``ctc_lengths``: of the encoder that CTC trains; samples with fewer of its frames than
        CTC needs for their units are bad (too_few_frames). None: no such check."""
        self.storage, self.front_end, self.augment = storage, front_end, augment
        self.text, self.max_seconds = text, max_seconds
        self.features_on_device, self.ctc_lengths = features_on_device, ctc_lengths
        self.voices: Sequence[Tensor] = ()  # for babble
        self.recordings: Sequence[Tensor] = ()  # of the noise shards

    def collate(self, task: Task, allocate: Allocate) -> tuple[np.ndarray, CollatedBatch]:
        """A task's padded array, [B, T, F] features or [B, n] audio, and the rest of its batch.

        Bad samples are left out and named. Raises `ShardReadError` where a shard cannot be read.
        """
        stats = dict.fromkeys(("read_s", "decode_s", "augment_s", "feature_s", "text_s"), 0.0)
        bytes_before, samples = self.storage.bytes, []
        bad: dict[int, DroppedSample] = {}  # by position in the task
        # All labels first: between two recordings the same work takes several times as long, as
        # the decoder fills the processor's caches.
        labels = self._read_labels(task, stats, bad)
        # Features are computed in the batch's memory, whose planned shape is nearly always right.
        batch = None if self.features_on_device else allocate(self._planned_shape(task))
        augments = self._augment_params(task)
        for position in list(labels):
            found = labels.pop(position)  # and with it the encoded audio
            out = None if batch is None else torch.from_numpy(batch[len(samples)])
            planned, params = task.samples[position], augments[position]
            try:
                samples.append(self._collate_sample(planned, found, params, stats, out))
            except BadSample as error:
                bad[position] = error.record
        longest = max((len(sample.features) for sample in samples), default=0)
        if batch is None:
            array = _pad_features(samples, allocate((len(samples), longest)))
        elif batch.shape[:2] == (len(samples), longest):
            for sample, row in zip(samples, batch, strict=True):
                row[len(sample.features) :] = 0.0
            array = batch
        else:
            shape = (len(samples), longest, self.front_end.bins)
            array = _pad_features(samples, _reshape_memory(batch, shape))
        stats["bytes"] = float(self.storage.bytes - bytes_before)
        in_order = [bad[position] for position in sorted(bad)]
        return array, self._collate_labels(samples, in_order, stats)

    def _read_labels(
        self, task: Task, stats: dict[str, float], bad: dict[int, DroppedSample]
    ) -> dict[int, _Labels]:
        """The labels of a task's samples by position, with their encoded audio; adds those that are
        ``bad``."""
        found = {}
        for position, planned in enumerate(task.samples):
            start = time.perf_counter()
            try:
                sample = self._read(planned)
                read = time.perf_counter()
                found[position] = self._encode(sample, planned)
                stats["text_s"] += time.perf_counter() - read
                stats["read_s"] += read - start
            except BadSample as error:
                bad[position] = error.record
        return found

    def _encode(self, sample: Sample, planned: PlannedSample) -> _Labels:
        if len(sample.text) > planned.entry.chars + CHARS_SLACK:
            # The batch was planned by the index; a longer text could exceed the memory.
            detail = f"{len(sample.text):,} characters, {planned.entry.chars:,} by the index"
            raise BadSample("too_much_text", sample.shard, sample.key, detail)
        return _Labels(sample, *self.text.encode(sample))

    def _planned_shape(self, task: Task) -> tuple[int, int, int]:
        """[B, T, F] of the batch if its samples are as planned."""
        step = self.front_end.rate / FRAMES_PER_SECOND
        lengths = (
            round(planned.entry.duration * self.front_end.rate)
            if self.augment is None or planned.plain
            else int(planned.frames * step)
            for planned in task.samples
        )
        longest = max(map(self.front_end.frames, lengths), default=0)
        return len(task.samples), longest, self.front_end.bins

    def _collate_labels(
        self, samples: list[_CollatedSample], bad: list[DroppedSample], stats: dict[str, float]
    ) -> CollatedBatch:
        phonemes, phoneme_lengths = pad([sample.phonemes for sample in samples])
        tokens, token_lengths = pad([sample.tokens for sample in samples], self.text.pad_id)
        return CollatedBatch(
            lengths=np.array([len(sample.features) for sample in samples], np.int64),
            phonemes=phonemes,
            phoneme_lengths=phoneme_lengths,
            tokens=tokens,
            token_lengths=token_lengths,
            keys=tuple(sample.key for sample in samples),
            shards=tuple(sample.shard for sample in samples),
            texts=tuple(sample.text for sample in samples),
            langs=tuple(sample.lang for sample in samples),
            speakers=tuple(sample.speaker for sample in samples),
            durations=tuple(sample.seconds for sample in samples),
            hints=tuple(sample.hint for sample in samples),
            bad=tuple(bad),
            stats=stats,
        )

    def _augment_params(self, task: Task) -> list[AugmentParams | None]:
        if self.augment is None:
            return [None] * len(task.samples)
        seeds = np.array([planned.seed for planned in task.samples], np.uint64)
        columns = AugmentParamColumns.sample(self.augment, seeds)
        return [
            None if planned.plain else columns.row(self.augment, i, planned.seed)
            for i, planned in enumerate(task.samples)
        ]

    def _collate_sample(
        self,
        planned: PlannedSample,
        labels: _Labels,
        params: AugmentParams | None,
        stats: dict[str, float],
        out: Tensor | None,
    ) -> _CollatedSample:
        """``out``: memory for the features, if they fit. Raises `BadSample`."""
        sample, text, phonemes, tokens = labels
        times = [time.perf_counter()]
        wave = self._decode(sample)
        times.append(time.perf_counter())
        if params is not None:
            wave = augment_wave(wave, params, self.voices, self.front_end.rate, self.recordings)
        times.append(time.perf_counter())
        seconds = len(wave) / self.front_end.rate
        if seconds * FRAMES_PER_SECOND > planned.frames + FRAME_SLACK:
            # The batch was planned by the index; a longer sample could exceed the memory.
            detail = f"{seconds:.2f} s, planned for {planned.frames / FRAMES_PER_SECOND:.2f} s"
            raise BadSample("wrong_duration", sample.shard, sample.key, detail)
        self._check_ctc(wave, phonemes, sample)
        features = self._features(wave, sample, out)
        times.append(time.perf_counter())
        names = ("decode_s", "augment_s", "feature_s")
        for name, start, end in zip(names, times, times[1:], strict=False):
            stats[name] += end - start
        hint = self.text.hint(sample.lang, planned.seed)
        source = sample.key, sample.shard, sample.lang, sample.speaker, hint
        return _CollatedSample(*source, features, seconds, text, phonemes, tokens)

    def _decode(self, sample: Sample, cut_seconds: float | None = None) -> Tensor:
        """Audio [n]: longer than ``max_seconds`` it is bad, longer than ``cut_seconds`` cut."""
        cut = cut_seconds is not None
        seconds = cut_seconds if cut else self.max_seconds
        try:
            wave = decode(sample.audio, rate=self.front_end.rate, max_seconds=seconds, cut=cut)
        except AudioError as error:
            raise BadSample(error.cause, sample.shard, sample.key, error.detail) from None
        if sample.text.strip() and is_silent(wave.numpy()):
            raise BadSample("silent_audio", sample.shard, sample.key, "all samples are zero")
        return wave

    def _check_ctc(self, wave: Tensor, units: list[int], sample: Sample) -> None:
        """Raise `BadSample` where no path of CTC writes ``units``: a frame each, and one between
        equal neighbors."""
        if self.ctc_lengths is None or not units:
            return
        frames = int(self.ctc_lengths(torch.tensor(self.front_end.frames(len(wave)))))
        needed = len(units) + sum(a == b for a, b in itertools.pairwise(units))
        if frames < needed:
            detail = f"{frames} encoder frames, and CTC needs {needed} for {len(units)} units"
            raise BadSample("too_few_frames", sample.shard, sample.key, detail)

    def _features(self, wave: Tensor, sample: Sample, out: Tensor | None) -> Tensor:
        if len(wave) < self.front_end.window:
            raise BadSample("too_short", sample.shard, sample.key, f"{len(wave)} samples of audio")
        if self.features_on_device:
            return wave
        fits = out is not None and self.front_end.frames(len(wave)) <= len(out)
        return self.front_end.features(wave, out if fits else None)

    def _read(self, planned: PlannedSample) -> Sample:
        entry, shard = planned.entry, planned.shard
        audio_span = entry.audio_offset, entry.audio_size
        try:
            audio, meta = self.storage.read_two(
                shard, audio_span, (entry.json_offset, entry.json_size)
            )
        except ShardTruncated as error:
            raise BadSample("truncated_tar", shard, entry.key, str(error)) from None
        return parse_sample(entry, shard, audio, meta)

    @one_thread()
    def compute_features(
        self, waves_BN: Tensor, lengths_B: Tensor, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """Collated audio → features [B, T, F] on ``device`` and their frames [B] on the CPU."""
        if not len(lengths_B):
            return torch.zeros(0, 0, self.front_end.bins, device=device), lengths_B
        lengths = lengths_B.to(device, non_blocking=True)
        features, frames = self.front_end.batch(waves_BN.to(device, non_blocking=True), lengths)
        return features, frames.cpu()

    def load_recordings(
        self, shards: Sequence[str], count: int, seconds: float | None = None
    ) -> tuple[list[Tensor], list[DroppedSample]]:
        """Up to ``count`` waves, one from each shard in turn, and the bad samples among them.

        At the features' sampling rate, cut to ``seconds`` if that is given. Deterministic.
        """
        waves, bad, unfinished = [], [], [self._samples_of(shard) for shard in shards[:count]]
        while unfinished and len(waves) < count:
            remaining = []
            for samples in unfinished:
                planned = next(samples, None)
                if planned is None or len(waves) == count:
                    continue
                remaining.append(samples)
                try:
                    waves.append(self._decode(self._read(planned), seconds))
                except BadSample as error:
                    bad.append(error.record)
            unfinished = remaining
        return waves, bad

    def _samples_of(self, shard: str) -> Iterator[PlannedSample]:
        for entry in load_or_build_index(self.storage, shard):
            yield PlannedSample(shard, entry, 0, 0)
