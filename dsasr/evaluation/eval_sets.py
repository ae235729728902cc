"""Recordings of a test set as they lie in the shards, also those without text, and their batches.

Training streams drop a sample without text: there is nothing to learn from it. A test wants it:
what a recognizer writes there was made up. Nothing is augmented or shuffled here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from dsasr.data.audio.features import AudioError, Cmvn, FbankConfig, decode, fbank
from dsasr.data.batch import Batch
from dsasr.data.dataloader.collate import pad
from dsasr.data.shards.index import BadSample, parse_sample
from dsasr.data.shards.index_cache import load_or_build_index
from dsasr.data.shards.storage import ShardStorage, StorageConfig
from dsasr.data.text.normalization import TextConfig, normalize_text
from dsasr.utils.errors import UserError


@dataclass(frozen=True)
class Recording:
    """One test utterance; ``text`` is empty for non-speech. ``wave`` is float32 [n], mono."""

    key: str
    wave: np.ndarray = field(repr=False)
    text: str
    lang: str
    speaker: str
    phonemes: tuple[str, ...] | None = None
    alignment: dict | None = field(default=None, repr=False)

    def seconds(self, rate: int) -> float:
        return len(self.wave) / rate


def read(
    shards: str | Sequence[str],
    *,
    rate: int = 16000,
    text: TextConfig | None = None,
    source: StorageConfig | None = None,
    limit: int = 0,
    max_seconds: float = 60.0,
) -> tuple[list[Recording], Counter[str]]:
    """Recordings of ``shards`` (folders, tars or patterns), and what was left out, by cause.

    ``limit`` takes that many of each set, evenly spread over it (0: all), so that every speaker
    and language is among them. Raises `UserError` if nothing is left.
    """
    sources = ShardStorage(source)
    listed = []
    for place in [shards] if isinstance(shards, str) else shards:
        whole = [
            (shard, entry)
            for shard in sources.resolve(place).shards
            for entry in load_or_build_index(sources, shard)
        ]
        if limit and limit < len(whole):
            whole = [whole[i * len(whole) // limit] for i in range(limit)]
        listed += whole
    found, causes = [], Counter()
    for shard, entry in listed:
        spans = (entry.audio_offset, entry.audio_size), (entry.json_offset, entry.json_size)
        try:
            sample = parse_sample(entry, shard, *sources.read_two(shard, *spans))
            wave = decode(sample.audio, rate=rate, max_seconds=max_seconds).numpy()
        except (BadSample, AudioError) as error:
            causes[error.cause] += 1
            continue
        words = normalize_text(sample.text, sample.lang, text)
        labels = sample.phonemes, sample.alignment
        found.append(Recording(sample.key, wave, words, sample.lang, sample.speaker, *labels))
    if not found:
        raise UserError(f"{shards}: no recording could be read ({dict(causes) or 'it is empty'})")
    return found, causes


def batches(
    recordings: Sequence[Recording],
    *,
    fbank_config: FbankConfig,
    cmvn: Cmvn,
    tokenizer=None,
    frames: int = 4000,
) -> Iterator[Batch]:
    """Batches of up to about ``frames`` padded frames, longest first: alike lengths lie together.

    With a ``tokenizer`` they hold transcript tokens and the end, without one no tokens at all.
    Audio shorter than a window is padded to one with zeros.
    """
    order = sorted(recordings, key=lambda r: (-len(r.wave), r.key))
    held: list[Recording] = []
    for recording in order:
        longest = fbank_config.frames(len((held or [recording])[0].wave))
        if held and (len(held) + 1) * longest > frames:
            yield _batch(held, fbank_config, cmvn, tokenizer)
            held = []
        held.append(recording)
    if held:
        yield _batch(held, fbank_config, cmvn, tokenizer)


def _batch(held: list[Recording], config: FbankConfig, cmvn: Cmvn, tokenizer) -> Batch:
    rows = []
    for recording in held:
        wave = torch.from_numpy(np.ascontiguousarray(recording.wave, dtype=np.float32))
        if len(wave) < config.window:
            wave = torch.nn.functional.pad(wave, (0, config.window - len(wave)))
        rows.append(cmvn.apply(fbank(wave, config)))
    features_BTF = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    ids, pad_id = [[] for _ in held], 0
    if tokenizer is not None:
        ids = [[*tokenizer.encode(r.text), tokenizer.end_id] for r in held]
        pad_id = tokenizer.pad_id
    tokens_BU, token_lengths_B = map(torch.from_numpy, pad(ids, pad_id))
    return Batch.blank(
        features_BTF,
        feature_lengths_B=torch.tensor([len(row) for row in rows]),
        tokens_BU=tokens_BU,
        token_lengths_B=token_lengths_B,
        keys=tuple(r.key for r in held),
        texts=tuple(r.text for r in held),
        langs=tuple(r.lang for r in held),
        speakers=tuple(r.speaker for r in held),
        durations=tuple(r.seconds(config.rate) for r in held),
    )
