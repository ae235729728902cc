"""What shards hold, in figures that add up over shards: histograms, counts, the oddest utterances.

Memory does not grow with the data: histograms have fixed bins, of each measure the most extreme
utterances are kept, and a few at random by their keys' hashes. `dsasr data inspect` shows it.
"""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from torch import Tensor

from dsasr.data.audio.decoding import decode
from dsasr.data.audio.files import ERRORS, AudioError, open_audio
from dsasr.data.audio.measure import measure_audio
from dsasr.data.audio.resampling import RATE
from dsasr.data.shards.build_index import readable_index
from dsasr.data.shards.sample import BadSample, DroppedSample, Sample
from dsasr.data.shards.verify import decode_shard
from dsasr.utils.hashing import hash64

MAX_SECONDS = 600.0  # longer utterances are bad
MAX_TEXT = 400  # characters of a transcript that are kept
MAX_NAMES = 200_000  # speakers that are counted one by one


@dataclass(frozen=True)
class Utterance:
    """An utterance and its measures; ``order`` is random, a function of shard and key."""

    tar: Path
    key: str
    lang: str
    speaker: str
    text: str
    seconds: float
    rate: float  # characters a second
    level: float  # dB of full scale
    clipped: float  # share of samples
    snr: float  # dB
    order: int


@dataclass
class Histogram:
    """Counts in bins of equal width from ``low`` up; the ends take what lies beyond.

    Values of [low, high) fall into their bin; ``lowest`` and ``highest`` are exact.
    """

    low: float
    width: float
    counts: np.ndarray  # [bins] int64
    lowest: float = np.inf
    highest: float = -np.inf

    @classmethod
    def empty(cls, low: float, high: float, width: float) -> Histogram:
        return cls(low, width, np.zeros(round((high - low) / width), np.int64))

    def add(self, value: float) -> None:
        number = int((value - self.low) / self.width)
        self.counts[min(max(number, 0), len(self.counts) - 1)] += 1
        self.lowest, self.highest = min(self.lowest, value), max(self.highest, value)

    def merge(self, other: Histogram) -> None:
        self.counts += other.counts
        self.lowest = min(self.lowest, other.lowest)
        self.highest = max(self.highest, other.highest)

    @property
    def total(self) -> int:
        return int(self.counts.sum())

    def quantile(self, share: float) -> float:
        """To within half a bin; NaN of nothing."""
        if not self.total:
            return float("nan")
        number = int(np.searchsorted(np.cumsum(self.counts), share * self.total))
        middle = self.low + (min(number, len(self.counts) - 1) + 0.5) * self.width
        return float(min(max(middle, self.lowest), self.highest))


# Measure → its histogram's (low, high, width). Clipping has no useful low end.
MEASURES = {
    "seconds": (0.0, MAX_SECONDS, 0.1),
    "rate": (0.0, 100.0, 0.25),
    "level": (-100.0, 1.0, 0.5),
    "clipped": (0.0, 1.0, 1e-4),
    "snr": (0.0, 101.0, 0.5),
}
ONE_SIDED = ("clipped",)


@dataclass
class ShardMeasures:
    """Of one shard, or of several merged; ``odd`` is how many utterances each measure keeps, half
    of them at either end, ``random`` how many are kept at random."""

    odd: int = 50
    random: int = 20
    shards: int = 0
    utterances: int = 0
    seconds: float = 0.0
    histograms: dict[str, Histogram] = field(
        default_factory=lambda: {name: Histogram.empty(*bins) for name, bins in MEASURES.items()}
    )
    langs: dict[str, list[float]] = field(default_factory=dict)  # → [utterances, seconds]
    speakers: Counter[str] = field(default_factory=Counter)  # → utterances
    formats: Counter[str] = field(default_factory=Counter)
    characters: Counter[str] = field(default_factory=Counter)
    bad: Counter[str] = field(default_factory=Counter)  # by cause
    bad_examples: dict[str, DroppedSample] = field(default_factory=dict)
    extremes: dict[str, list[Utterance]] = field(default_factory=dict)
    chosen: list[Utterance] = field(default_factory=list)

    def add(self, utterance: Utterance, audio_format: str) -> None:
        self.utterances += 1
        self.seconds += utterance.seconds
        for name, histogram in self.histograms.items():
            histogram.add(getattr(utterance, name))
        sums = self.langs.setdefault(utterance.lang, [0, 0.0])
        sums[0] += 1
        sums[1] += utterance.seconds
        if utterance.speaker in self.speakers or len(self.speakers) < MAX_NAMES:
            self.speakers[utterance.speaker] += 1
        self.formats[audio_format] += 1

    def keep(self, utterances: Iterable[Utterance]) -> None:
        """Of ``utterances`` and those kept before, the most extreme, and some at random."""
        found = list(utterances)
        rows = dict.fromkeys([*self.chosen, *found])
        self.chosen = sorted(rows, key=lambda u: u.order)[: self.random]
        for name in MEASURES:
            rows = sorted([*self.extremes.get(name, ()), *found],
                          key=lambda u, name=name: (getattr(u, name), u.order))  # fmt: skip
            rows = list(dict.fromkeys(rows))
            if name in ONE_SIDED:
                rows = [row for row in rows if getattr(row, name)][-self.odd :]
            elif len(rows) > self.odd:
                half = self.odd // 2
                rows = rows[: self.odd - half] + rows[len(rows) - half :]
            self.extremes[name] = rows

    def merge(self, other: ShardMeasures) -> None:
        self.shards += other.shards
        self.utterances += other.utterances
        self.seconds += other.seconds
        for name, histogram in other.histograms.items():
            self.histograms[name].merge(histogram)
        for lang, (count, seconds) in other.langs.items():
            sums = self.langs.setdefault(lang, [0, 0.0])
            sums[0] += count
            sums[1] += seconds
        for speaker, count in other.speakers.items():
            if speaker in self.speakers or len(self.speakers) < MAX_NAMES:
                self.speakers[speaker] += count
        for name in ("formats", "characters", "bad"):
            getattr(self, name).update(getattr(other, name))
        self.bad_examples = other.bad_examples | self.bad_examples
        self.keep({u: None for rows in (other.chosen, *other.extremes.values()) for u in rows})


def measure_shard(tar: Path, odd: int = 50, random: int = 20) -> ShardMeasures:
    """Read and decode everything of a local shard. Raises `UserError` where it cannot be read."""
    found, waiting = ShardMeasures(odd, random, shards=1), []
    for decoded in decode_shard(tar, MAX_SECONDS):
        if isinstance(decoded, BadSample):
            found.bad[decoded.cause] += 1
            found.bad_examples.setdefault(decoded.cause, decoded.record)
            continue
        sample, wave = decoded
        audio, seconds = measure_audio(wave), len(wave) / RATE
        utterance = Utterance(
            tar, sample.key, sample.lang, sample.speaker, sample.text[:MAX_TEXT], seconds,
            len(sample.text) / seconds, audio.level, audio.clipped, audio.snr,
            hash64(f"{tar.name}\n{sample.key}"),
        )  # fmt: skip
        found.add(utterance, _format(sample))
        found.characters.update(sample.text)
        waiting.append(utterance)
        if len(waiting) == 4 * odd:
            found.keep(waiting)
            waiting = []
    found.keep(waiting)
    return found


def _format(sample: Sample) -> str:
    """As ``flac 16 kHz``."""
    rate = 0
    with contextlib.suppress(*ERRORS), open_audio(sample.audio) as file:
        rate = file.samplerate
    return f"{sample.extension} {rate / 1000:g} kHz" if rate else sample.extension


def read_audio(
    utterances: Iterable[Utterance], seconds: float
) -> Iterator[tuple[Utterance, Tensor]]:
    """Each utterance with the first ``seconds`` of its audio, float32 [n] at 16 kHz; shard by
    shard, each index read once. Those that can no longer be read are left out."""
    by_tar: dict[Path, dict[str, Utterance]] = {}
    for utterance in utterances:
        by_tar.setdefault(utterance.tar, {})[utterance.key] = utterance
    for tar, wanted in by_tar.items():
        with open(tar, "rb") as file:
            for entry in readable_index(tar):
                if entry.key in wanted:
                    data = os.pread(file.fileno(), entry.audio_size, entry.audio_offset)
                    with contextlib.suppress(AudioError):
                        wave = decode(data, rate=RATE, max_seconds=seconds, cut=True)
                        yield wanted[entry.key], wave
