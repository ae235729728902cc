"""Evaluation sets: the recordings of shards, also those without text, and batches of them.

The training dataloader drops a sample without text, from which nothing can be learned. An
evaluation needs it: any text that a recognizer writes there is a hallucination. Nothing is
augmented or shuffled here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from dsasr.data.audio.features import AudioError, Cmvn, FbankConfig, decode, fbank
from dsasr.data.batch import Batch
from dsasr.data.dataloader.collate import BatchMaker, TextEncoder, pad
from dsasr.data.shards.index import BadSample, parse_sample
from dsasr.data.shards.storage import SourceConfig, Sources
from dsasr.data.text.prompt import TextConfig, normalize_text
from dsasr.utils.errors import UserError


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
    source: SourceConfig | None = None,
    limit: int = 0,
    max_seconds: float = 60.0,
) -> tuple[list[Recording], Counter[str]]:
    """Recordings of ``shards`` (folders, tars or patterns), and the samples left out, by cause.

    ``limit`` takes that many of each folder, tar or pattern, evenly spread over it (0: all), so
    that every speaker and language is among them. Raises `UserError` if no recording is readable.
    """
    sources = Sources(source)
    maker = BatchMaker(
        sources=sources, fbank=FbankConfig(rate=rate), cmvn=None, augment=None,
        text=TextEncoder(), max_seconds=max_seconds, waves=True,
    )  # fmt: skip
    samples = []
    for pattern in [shards] if isinstance(shards, str) else shards:
        entries = [(s, e) for s in sources.resolve(pattern).shards for e in maker.load_index(s)]
        if limit and limit < len(entries):
            entries = [entries[i * len(entries) // limit] for i in range(limit)]
        samples += entries
    recordings, causes = [], Counter()
    for shard, entry in samples:
        spans = (entry.audio_offset, entry.audio_size), (entry.json_offset, entry.json_size)
        try:
            sample = parse_sample(entry, shard, *sources.read_both(shard, *spans))
            wave = decode(sample.audio, rate=rate, max_seconds=max_seconds).numpy()
        except (BadSample, AudioError) as error:
            causes[error.cause] += 1
            continue
        words = normalize_text(sample.text, sample.lang, text)
        labels = sample.phonemes, sample.alignment
        recordings.append(Recording(sample.key, wave, words, sample.lang, sample.speaker, *labels))
    if not recordings:
        raise UserError(f"{shards}: no recording could be read ({dict(causes) or 'it is empty'})")
    return recordings, causes


def batch_recordings(
    recordings: Sequence[Recording],
    *,
    fbank_config: FbankConfig,
    cmvn: Cmvn,
    tokenizer=None,
    frames: int = 4000,
) -> Iterator[Batch]:
    """Batches of up to about ``frames`` padded frames, by falling length.

    With a ``tokenizer`` they hold transcript tokens and the end token, without one no tokens.
    Audio shorter than a window is padded to one with zeros.
    """
    by_length = sorted(recordings, key=lambda r: (-len(r.wave), r.key))
    group: list[Recording] = []
    for recording in by_length:
        longest = fbank_config.frames(len((group or [recording])[0].wave))
        if group and (len(group) + 1) * longest > frames:
            yield _collate(group, fbank_config, cmvn, tokenizer)
            group = []
        group.append(recording)
    if group:
        yield _collate(group, fbank_config, cmvn, tokenizer)


def empty_batch(fbank_config: FbankConfig, pad_id: int = 0) -> Batch:
    """A batch without utterances, for a rank that must keep step."""
    return _filled([], torch.zeros(0, 1, fbank_config.mels), [], [], pad_id, fbank_config.rate)


def _collate(recordings: list[Recording], config: FbankConfig, cmvn: Cmvn, tokenizer) -> Batch:
    rows = []
    for recording in recordings:
        wave = torch.from_numpy(np.ascontiguousarray(recording.wave, dtype=np.float32))
        if len(wave) < config.window:
            wave = torch.nn.functional.pad(wave, (0, config.window - len(wave)))
        rows.append(cmvn.apply(fbank(wave, config)))
    features_BTF = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    ids, pad_id = [[] for _ in recordings], 0
    if tokenizer is not None:
        ids = [[*tokenizer.encode(r.text), tokenizer.end_id] for r in recordings]
        pad_id = tokenizer.pad_id
    lengths = [len(row) for row in rows]
    return _filled(recordings, features_BTF, lengths, ids, pad_id, config.rate)


def _filled(
    recordings: list[Recording],
    features_BTF: torch.Tensor,
    lengths: list[int],
    ids: list[list[int]],
    pad_id: int,
    rate: int,
) -> Batch:
    tokens, token_lengths = map(torch.from_numpy, pad(ids, pad_id))
    none, zeros = map(torch.from_numpy, pad([[] for _ in recordings]))
    return Batch(
        features_BTF=features_BTF,
        feature_lengths_B=torch.tensor(lengths, dtype=torch.int64),
        phonemes_BP=none,
        phoneme_lengths_B=zeros,
        tokens_BU=tokens,
        token_lengths_B=token_lengths,
        keys=tuple(r.key for r in recordings),
        shards=("",) * len(recordings),
        texts=tuple(r.text for r in recordings),
        langs=tuple(r.lang for r in recordings),
        speakers=tuple(r.speaker for r in recordings),
        durations=tuple(r.seconds(rate) for r in recordings),
        seed=0,
        epoch=0,
        number=0,
        state={},
    )
