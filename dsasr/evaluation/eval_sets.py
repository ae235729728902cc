"""Evaluation sets: the recordings of shards, also those without text, and batches of them.

The training dataloader drops a sample without text, from which nothing can be learned. An
evaluation needs it: any text that a recognizer writes there is a hallucination. Nothing is
augmented or shuffled here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from dsasr.data.audio.decoding import decode
from dsasr.data.audio.files import AudioError
from dsasr.data.audio.frontends import FrontEnd
from dsasr.data.batch import Batch
from dsasr.data.dataloader.collate import pad
from dsasr.data.shards.index_cache import load_or_build_index
from dsasr.data.shards.sample import BadSample, SampleFields, parse_sample
from dsasr.data.shards.storage import ShardStorage, StorageConfig
from dsasr.data.text.normalization import TextConfig, normalize_text
from dsasr.utils.errors import UserError

MAX_SECONDS = 60.0  # of a recording


def longest_seconds(front_end: FrontEnd) -> float:
    """Seconds of the longest recording that is evaluated: what the encoder reads, at most
    `MAX_SECONDS`."""
    return min(MAX_SECONDS, front_end.max_seconds)


@dataclass(frozen=True)
class Recording:
    """One recording of a set; ``text`` is empty for non-speech. ``wave`` is float32 [n], mono."""

    key: str
    wave: np.ndarray = field(repr=False)
    text: str
    lang: str
    speaker: str
    phonemes: tuple[str, ...] | None = None
    alignment: dict | None = field(default=None, repr=False)

    def seconds(self, rate: int) -> float:
        return len(self.wave) / rate


def read_recordings(
    shards: str | Sequence[str],
    *,
    rate: int = 16000,
    text: TextConfig | None = None,
    source: StorageConfig | None = None,
    fields: SampleFields | None = None,
    limit: int = 0,
    max_seconds: float = MAX_SECONDS,
    keys: Collection[str] = (),
) -> tuple[list[Recording], Counter[str]]:
    """Recordings of ``shards`` (folders, tars or patterns), and the samples left out, by cause.

    ``fields``: as in `ShardStorage.resolve`.
    ``limit`` takes that many of each folder, tar or pattern, evenly spread over it (0: all), so
    that every speaker and language is among them; ``keys`` takes those alone. A recording above
    ``max_seconds`` (`longest_seconds`) is too_long. Raises `UserError` if none is readable.
    """
    storage = ShardStorage(source)
    samples = []
    for pattern in [shards] if isinstance(shards, str) else shards:
        entries = [
            (shard, entry)
            for shard in storage.resolve(pattern, fields).shards
            for entry in load_or_build_index(storage, shard)
        ]
        if keys:
            entries = [(shard, entry) for shard, entry in entries if entry.key in keys]
        if limit and limit < len(entries):
            entries = [entries[i * len(entries) // limit] for i in range(limit)]
        samples += entries
    recordings, causes = [], Counter()
    for shard, entry in samples:
        spans = (entry.audio_offset, entry.audio_size), (entry.json_offset, entry.json_size)
        try:
            sample = parse_sample(entry, shard, *storage.read_two(shard, *spans))
            wave = decode(sample.audio, rate=rate, max_seconds=max_seconds).numpy()
            if sample.text.strip() and not wave.any():
                raise AudioError("silent_audio")
        except (BadSample, AudioError) as error:
            causes[error.cause] += 1
            continue
        words = normalize_text(sample.text, text)
        labels = sample.phonemes, sample.alignment
        recordings.append(Recording(sample.key, wave, words, sample.lang, sample.speaker, *labels))
    if not recordings:
        names = shards if isinstance(shards, str) else ", ".join(shards)
        why = ", ".join(f"{cause} {count:,}" for cause, count in causes.items())
        why = why or "no shards, which `dsasr data make-shards` makes of a manifest"
        raise UserError(f"{names}: no recording could be read ({why})")
    return recordings, causes


def batch_recordings(
    recordings: Sequence[Recording],
    *,
    front_end: FrontEnd,
    tokenizer=None,
    frames: int = 4000,
) -> Iterator[Batch]:
    """Batches of up to about ``frames`` padded frames of 10 ms, by falling length.

    With a ``tokenizer`` they hold transcript tokens and the end token, without one no tokens.
    Audio shorter than a window is padded to one with zeros.
    """
    by_length = sorted(recordings, key=lambda r: (-len(r.wave), r.key))
    group: list[Recording] = []
    for recording in by_length:
        longest = 100 * len((group or [recording])[0].wave) // front_end.rate
        if group and (len(group) + 1) * longest > frames:
            yield _collate(group, front_end, tokenizer)
            group = []
        group.append(recording)
    if group:
        yield _collate(group, front_end, tokenizer)


def _collate(recordings: list[Recording], front_end: FrontEnd, tokenizer) -> Batch:
    rows = []
    for recording in recordings:
        wave = torch.from_numpy(np.ascontiguousarray(recording.wave, dtype=np.float32))
        if len(wave) < front_end.window:
            wave = torch.nn.functional.pad(wave, (0, front_end.window - len(wave)))
        rows.append(front_end.features(wave))
    features_BTF = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    ids, pad_id = [[] for _ in recordings], 0
    if tokenizer is not None:
        ids = [[*tokenizer.encode(r.text), tokenizer.end_id] for r in recordings]
        pad_id = tokenizer.pad_id
    tokens_BU, token_lengths_B = map(torch.from_numpy, pad(ids, pad_id))
    return Batch.blank(
        features_BTF,
        feature_lengths_B=torch.tensor([len(row) for row in rows]),
        tokens_BU=tokens_BU,
        token_lengths_B=token_lengths_B,
        keys=tuple(r.key for r in recordings),
        texts=tuple(r.text for r in recordings),
        langs=tuple(r.lang for r in recordings),
        speakers=tuple(r.speaker for r in recordings),
        durations=tuple(r.seconds(front_end.rate) for r in recordings),
    )
