"""A planned sample becomes features and labels; a task becomes a batch's arrays.

Runs in worker processes. Everything random comes from the sample's planned seed, so a sample is
the same whoever makes it and whatever became of its neighbors. What is wrong with a sample is
counted by cause and named; the rest of its batch is not touched.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dsasr.data.audio.augment import AugmentConfig, AugmentParams, augment_wave
from dsasr.data.audio.features import (
    AudioError,
    Cmvn,
    FbankConfig,
    decode,
    fbank,
    fbank_batch,
    one_thread,
)
from dsasr.data.dataloader.augment_params import AugmentParamColumns
from dsasr.data.dataloader.bucketing import FRAMES_PER_SECOND, Bad, PlannedSample, Task
from dsasr.data.dataloader.workers import Allocate
from dsasr.data.shards.index import (
    BadSample,
    Sample,
    ShardIndex,
    build_index,
    load_index,
    parse_sample,
)
from dsasr.data.shards.storage import Missing, SourceError, Sources, Truncated
from dsasr.data.shards.urls import is_pipe
from dsasr.data.text.normalization import TextConfig, normalize_text
from dsasr.data.text.phonemes import (
    MissingPhonemes,
    PhonemeVocab,
    Phonemizer,
    UnknownPhoneme,
    UnknownWord,
)
from dsasr.data.text.tokenizers import Tokenizer
from dsasr.utils.io import atomic_write

FRAME_SLACK = 10  # frames by which a sample may exceed its plan: rounding of durations and speeds


@dataclass(frozen=True)
class TextEncoder:
    """Transcripts to labels. What is None is not made: no phonemes for SFT, no tokens for CTC."""

    config: TextConfig | None = None
    phonemizer: Phonemizer | None = None
    vocab: PhonemeVocab | None = None
    tokenizer: Tokenizer | None = None

    @property
    def pad_id(self) -> int:
        return self.tokenizer.pad_id if self.tokenizer is not None else 0

    def encode(self, sample: Sample) -> tuple[str, list[int], list[int]]:
        """(normalized text, phoneme ids, transcript tokens + end_id). Raises `BadSample`."""

        def bad(cause: str, detail: str) -> BadSample:
            return BadSample(cause, sample.shard, sample.key, detail)

        text = normalize_text(sample.text, sample.lang, self.config)
        if not text and (self.config is None or self.config.empty == "drop"):
            raise bad("empty_text", repr(sample.text[:40]))
        phonemes: list[int] = []
        if self.phonemizer is not None:
            try:
                symbols = self.phonemizer.for_sample(sample)
                phonemes = self.vocab.encode(symbols) if self.vocab is not None else []
            except UnknownPhoneme as error:
                raise bad("unknown_phoneme", str(error)) from None
            except UnknownWord as error:
                raise bad("unknown_word", str(error)) from None
            except MissingPhonemes as error:
                raise bad("missing_phonemes", str(error)) from None
            if text and not symbols:
                raise bad("no_phonemes", repr(text[:40]))
        tokens: list[int] = []
        if self.tokenizer is not None:
            tokens = [*self.tokenizer.encode(text), self.tokenizer.end_id]
        return text, phonemes, tokens


@dataclass
class CollatedBatch:
    """What a worker hands over beside the array: everything of a batch that is not features."""

    lengths: np.ndarray  # [B] frames, or samples of audio where features are made on the device
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
    bad: tuple[Bad, ...]
    stats: dict[str, float]


def pad(rows: list[list[int]], value: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Rows padded on the right [B, longest], and their lengths [B]; int64."""
    lengths = np.array([len(row) for row in rows], np.int64)
    padded = np.full((len(rows), int(lengths.max(initial=0))), value, np.int64)
    for i, row in enumerate(rows):
        padded[i, : len(row)] = row
    return padded, lengths


@dataclass
class _Row:
    """A sample without its encoded audio, whose memory the next one's is to take while hot."""

    key: str
    shard: str
    lang: str
    speaker: str
    features: Tensor  # [T, F] normalized, or [n] audio where features are made on the device
    seconds: float
    text: str
    phonemes: list[int]
    tokens: list[int]


def _padded(rows: list[_Row], array: np.ndarray) -> np.ndarray:
    """The rows' features in ``array``, [B, longest, …], zero behind them; they may lie in it."""
    held = [row.features.clone() for row in rows]
    for features, target in zip(held, torch.from_numpy(array), strict=True):
        target[: len(features)] = features
        target[len(features) :] = 0.0
    return array


def _shrunk(array: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """Of ``array``'s memory as much as ``shape`` needs, or new memory if that is more."""
    size = int(np.prod(shape))
    flat = array.reshape(-1)[:size] if size <= array.size else np.empty(size, np.float32)
    return flat.reshape(shape)


class BatchMaker:
    """Makes batches from tasks. Forked into the workers; holds no state that a batch depends on."""

    def __init__(
        self,
        *,
        sources: Sources,
        fbank: FbankConfig,
        cmvn: Cmvn | None,
        augment: AugmentConfig | None,
        text: TextEncoder,
        max_seconds: float,
        waves: bool,
    ) -> None:
        self.sources, self.fbank, self.cmvn, self.augment = sources, fbank, cmvn, augment
        self.text, self.max_seconds, self.waves = text, max_seconds, waves
        self.voices: Sequence[Tensor] = ()  # for babble
        self.recorded: Sequence[Tensor] = ()  # noise as it lies in noise shards
        if cmvn is not None:
            self.shift_F, self.scale_F = cmvn.mean_F.float(), (1.0 / cmvn.std_F).float()

    def make(self, task: Task, allocate: Allocate) -> tuple[np.ndarray, CollatedBatch]:
        """A task's padded array, [B, T, F] features or [B, n] audio, and the rest of its batch.

        Bad samples are left out and named. Raises `SourceError` where a shard cannot be read.
        """
        stats = dict.fromkeys(("read_s", "decode_s", "augment_s", "feature_s", "text_s"), 0.0)
        before, rows, bad = self.sources.bytes, [], []
        room = None if self.waves else allocate(self._expected(task))
        for planned, params in zip(task.samples, self._augment_params(task), strict=True):
            place = None if room is None else torch.from_numpy(room[len(rows)])
            try:
                rows.append(self._row(planned, params, stats, place))
            except BadSample as error:
                bad.append((error.cause, planned.shard, planned.entry.key, error.detail))
        longest = max((len(row.features) for row in rows), default=0)
        if room is None:
            array = _padded(rows, allocate((len(rows), longest)))
        elif room.shape[:2] == (len(rows), longest):
            for row, place in zip(rows, room, strict=True):
                place[len(row.features) :] = 0.0
            array = room
        else:
            array = _padded(rows, _shrunk(room, (len(rows), longest, self.fbank.mels)))
        stats["bytes"] = float(self.sources.bytes - before)
        return array, self._made(rows, bad, stats)

    def _expected(self, task: Task) -> tuple[int, int, int]:
        """The batch's shape, if its samples are as planned: features are made where they stay."""
        step = self.fbank.rate / FRAMES_PER_SECOND
        lengths = (
            round(planned.entry.duration * self.fbank.rate)
            if self.augment is None or planned.plain
            else int(planned.frames * step)
            for planned in task.samples
        )
        longest = max(map(self.fbank.frames, lengths), default=0)
        return len(task.samples), longest, self.fbank.mels

    def _made(self, rows: list[_Row], bad: list[Bad], stats: dict[str, float]) -> CollatedBatch:
        phonemes, phoneme_lengths = pad([row.phonemes for row in rows])
        tokens, token_lengths = pad([row.tokens for row in rows], self.text.pad_id)
        return CollatedBatch(
            lengths=np.array([len(row.features) for row in rows], np.int64),
            phonemes=phonemes,
            phoneme_lengths=phoneme_lengths,
            tokens=tokens,
            token_lengths=token_lengths,
            keys=tuple(row.key for row in rows),
            shards=tuple(row.shard for row in rows),
            texts=tuple(row.text for row in rows),
            langs=tuple(row.lang for row in rows),
            speakers=tuple(row.speaker for row in rows),
            durations=tuple(row.seconds for row in rows),
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

    def _row(
        self,
        planned: PlannedSample,
        params: AugmentParams | None,
        stats: dict[str, float],
        place: Tensor | None,
    ) -> _Row:
        """``place``: memory for the features, if they fit."""
        times = [time.perf_counter()]
        sample = self._read(planned)
        times.append(time.perf_counter())
        text, phonemes, tokens = self.text.encode(sample)
        times.append(time.perf_counter())
        wave = self._decode(sample)
        times.append(time.perf_counter())
        if params is not None:
            wave = augment_wave(wave, params, self.voices, self.fbank.rate, self.recorded)
        times.append(time.perf_counter())
        seconds = len(wave) / self.fbank.rate
        if seconds * FRAMES_PER_SECOND > planned.frames + FRAME_SLACK:
            # The batch was cut for what the index says; a longer sample could exceed memory.
            detail = f"{seconds:.2f} s, planned for {planned.frames / FRAMES_PER_SECOND:.2f} s"
            raise BadSample("wrong_duration", sample.shard, sample.key, detail)
        features = self._features(wave, sample, place)
        times.append(time.perf_counter())
        names = ("read_s", "text_s", "decode_s", "augment_s", "feature_s")
        for name, start, end in zip(names, times, times[1:], strict=False):
            stats[name] += end - start
        who = sample.key, sample.shard, sample.lang, sample.speaker
        return _Row(*who, features, seconds, text, phonemes, tokens)

    def _decode(self, sample: Sample, cut: float | None = None) -> Tensor:
        seconds = self.max_seconds if cut is None else cut
        try:
            return decode(
                sample.audio, rate=self.fbank.rate, max_seconds=seconds, cut=cut is not None
            )
        except AudioError as error:
            raise BadSample(error.cause, sample.shard, sample.key, error.detail) from None

    def _features(self, wave: Tensor, sample: Sample, place: Tensor | None) -> Tensor:
        if len(wave) < self.fbank.window:
            raise BadSample("too_short", sample.shard, sample.key, f"{len(wave)} samples of audio")
        if self.waves:
            return wave
        fits = place is not None and self.fbank.frames(len(wave)) <= len(place)
        features = fbank(wave, self.fbank, place if fits else None)
        return features if self.cmvn is None else features.sub_(self.shift_F).mul_(self.scale_F)

    def _read(self, planned: PlannedSample) -> Sample:
        entry, shard = planned.entry, planned.shard
        audio_span = entry.audio_offset, entry.audio_size
        try:
            audio, meta = self.sources.read_both(
                shard, audio_span, (entry.json_offset, entry.json_size)
            )
        except Truncated as error:
            raise BadSample("truncated_tar", shard, entry.key, str(error)) from None
        return parse_sample(entry, shard, audio, meta)

    @one_thread()
    def finish(
        self, waves_BN: Tensor, lengths_B: Tensor, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """Audio as a worker gave it → features [B, T, F] on ``device`` and frames [B]."""
        if not len(lengths_B):
            return torch.zeros(0, 0, self.fbank.mels, device=device), lengths_B
        lengths = lengths_B.to(device, non_blocking=True)
        features, frames = fbank_batch(waves_BN.to(device, non_blocking=True), lengths, self.fbank)
        if self.cmvn is not None:
            features = self.cmvn.apply(features)
            beyond = torch.arange(features.shape[1], device=device) >= frames[:, None]
            features = features.masked_fill(beyond[..., None], 0.0)
        return features, frames.cpu()

    def waves_of(
        self, shards: Sequence[str], count: int, seconds: float | None = None
    ) -> tuple[list[Tensor], list[Bad]]:
        """Up to ``count`` recordings, evenly from all shards, and what was unusable on the way.

        At our rate, cut to ``seconds`` where that is given; the same every time.
        """
        waves, bad, left = [], [], [iter(self._entries(shard)) for shard in shards[:count]]
        while left and len(waves) < count:
            still = []
            for entries in left:
                planned = next(entries, None)
                if planned is None or len(waves) == count:
                    continue
                still.append(entries)
                try:
                    waves.append(self._decode(self._read(planned), seconds))
                except BadSample as error:
                    bad.append((error.cause, planned.shard, planned.entry.key, error.detail))
            left = still
        return waves, bad

    def _entries(self, shard: str) -> Iterator[PlannedSample]:
        for entry in self.load_index(shard):
            yield PlannedSample(shard, entry, 0, 0)

    def load_index(self, shard: str) -> ShardIndex:
        """A shard's index: the file beside it, else one made from the tar and kept in the cache.

        Every rank gets the same, or a `SourceError`; what is wrong with the tar is in its ``bad``.
        """
        if not is_pipe(shard):
            with contextlib.suppress(Missing, ValueError, TypeError):
                return load_index(self.sources.whole(_index_name(shard)), shard)
        try:
            return self.sources.with_local(shard, lambda path: self._made_index(Path(path), shard))
        except Missing:
            raise SourceError(shard, 1, "it does not exist") from None

    def _made_index(self, path: Path, shard: str) -> ShardIndex:
        stat = path.stat()
        name = hashlib.sha256(f"{shard}\n{stat.st_size}\n{stat.st_mtime_ns}".encode()).hexdigest()
        if path.parent == self.sources.cache_folder:  # its time says when it was downloaded
            name = hashlib.sha256(f"{shard}\n{stat.st_size}".encode()).hexdigest()
        kept = self.sources.config.folder() / "indexes" / f"{name[:32]}.index.json"
        with contextlib.suppress(OSError, ValueError, TypeError):
            return load_index(kept.read_bytes(), shard)
        index = build_index(path, shard)
        with contextlib.suppress(OSError):  # a read-only home costs time, not correctness
            atomic_write(kept, index.dump())
        return index


def _index_name(shard: str) -> str:
    head, dot, _ = shard.rpartition(".tar")
    return f"{head if dot else shard}.index.json"
