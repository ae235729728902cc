"""Reads whole shards: verifies that every sample is usable, and takes the features' mean."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor

from dsasr.data.audio.features import RATE, AudioError, CmvnSums, FbankConfig, decode, fbank
from dsasr.data.shards.index import (
    BadSample,
    Sample,
    ShardIndex,
    build_index,
    index_path,
    load_index,
    read_sample,
)
from dsasr.data.shards.process_pool import each
from dsasr.data.shards.writer import read_dataset
from dsasr.utils.errors import UserError

Row = tuple[str, str, str, str]  # cause, shard, key, detail


def each_wave(
    tar: Path, max_seconds: float, index: ShardIndex | None = None, rate: int = RATE
) -> Iterator[BadSample | tuple[Sample, Tensor]]:
    """Every sample of a shard with its audio [n], or what is wrong with it."""
    index = build_index(tar) if index is None else index
    yield from index.bad
    with open(tar, "rb") as file:

        def fetch(offset: int, size: int) -> bytes:
            return os.pread(file.fileno(), size, offset)

        for entry in index:
            try:
                sample = read_sample(fetch, entry, str(tar))
                yield sample, decode(sample.audio, rate=rate, max_seconds=max_seconds)
            except BadSample as error:
                yield error
            except AudioError as error:
                yield BadSample(error.cause, str(tar), entry.key, error.detail)


@dataclass(frozen=True)
class Verdict:
    """What verifying a shard found: good samples, their seconds, and what is bad."""

    shard: str
    samples: int
    seconds: float
    bad: tuple[Row, ...]


def verify_shard(tar: Path, max_seconds: float = 600.0, allow_empty_text: bool = False) -> Verdict:
    """Read and decode everything; compare with the index and the durations that the json claims."""
    good, seconds, bad = 0, 0.0, []
    try:
        index = build_index(tar)
    except OSError as error:
        return Verdict(tar.name, 0, 0.0, (("unreadable", tar.name, "", str(error)),))
    for found in each_wave(tar, max_seconds, index):
        if isinstance(found, BadSample):
            bad.append((found.cause, tar.name, found.key, found.detail))
            continue
        sample, wave = found
        actual = len(wave) / RATE
        if not sample.text.strip() and not allow_empty_text:
            bad.append(("empty_text", tar.name, sample.key, ""))
        elif abs(sample.duration - actual) > max(0.1, 0.02 * actual):
            detail = f"json says {sample.duration:.3f} s, the audio has {actual:.3f} s"
            bad.append(("wrong_duration", tar.name, sample.key, detail))
        else:
            good += 1
            seconds += actual
    bad += _check_index(tar, index)
    return Verdict(tar.name, good, seconds, tuple(bad))


def _check_index(tar: Path, index: ShardIndex) -> list[Row]:
    path = index_path(tar)
    if not path.is_file():
        return [("missing_index", tar.name, "", "make the shard again")]
    try:
        held = load_index(path, str(tar))
    except (ValueError, OSError) as error:
        return [("bad_index", tar.name, "", str(error))]
    if held.dump() != index.dump():
        return [("bad_index", tar.name, "", "it is not this tar's index")]
    return []


def verify(
    tars: Sequence[Path], processes: int | None = None, allow_empty_text: bool = False
) -> tuple[list[Verdict], Counter[str]]:
    """Verdicts of all shards and the count of what is bad by cause; with a progress bar."""
    work = partial(verify_shard, allow_empty_text=allow_empty_text)
    verdicts = list(each(work, tars, processes, "verifying"))
    return verdicts, Counter(cause for v in verdicts for cause, *_ in v.bad)


def check_dataset(folder: Path, verdicts: Mapping[str, Verdict]) -> list[Row]:
    """What ``dataset.json`` says of ``folder`` that its shards, or rather their verdicts, deny."""
    bad: list[Row] = []
    try:
        listed = {row["name"]: row["samples"] for row in read_dataset(folder)["shards"]}
    except (UserError, KeyError, TypeError) as error:
        return [("bad_dataset", folder.name, "", str(error))]
    for name, samples in listed.items():
        if name not in verdicts:
            bad.append(("missing_shard", str(name), "", f"{samples} samples are gone with it"))
        else:
            held = verdicts[name].samples + sum(1 for _, _, key, _ in verdicts[name].bad if key)
            if held < samples:
                detail = f"dataset.json says {samples} samples, the shard has {held}"
                bad.append(("missing_samples", name, "", detail))
    bad += [
        ("unlisted_shard", name, "", "dataset.json lacks it")
        for name in verdicts
        if name not in listed
    ]
    return bad


def cmvn_sums(
    tar: Path, config: FbankConfig, max_seconds: float = 600.0
) -> tuple[CmvnSums, Counter[str]]:
    """Feature sums of one shard's usable samples, and a count of the others by cause."""
    sums, causes = CmvnSums(config.mels), Counter()
    for found in each_wave(tar, max_seconds, rate=config.rate):
        if isinstance(found, BadSample):
            causes[found.cause] += 1
        else:
            sums.update(fbank(found[1], config))
    return sums, causes
