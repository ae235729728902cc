"""Reads whole shards: verifies that every sample is usable, and sums the features for CMVN."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor

from dsasr.data.audio.decoding import decode
from dsasr.data.audio.features import CmvnSums, FbankConfig, fbank
from dsasr.data.audio.files import AudioError, is_silent
from dsasr.data.audio.resampling import RATE
from dsasr.data.dataloader.bucketing import BatchConfig
from dsasr.data.shards.build_index import local_index, readable_index
from dsasr.data.shards.index import ShardIndex, index_path, load_index
from dsasr.data.shards.process_pool import map_in_processes
from dsasr.data.shards.sample import BadSample, DroppedSample, Sample, read_sample
from dsasr.data.shards.writer import read_dataset
from dsasr.utils.errors import UserError

TRAINING = BatchConfig()  # whose limit on text training has by default


def decode_shard(
    tar: Path, max_seconds: float, index: ShardIndex | None = None, rate: int = RATE
) -> Iterator[BadSample | tuple[Sample, Tensor]]:
    """Every sample of a shard with its decoded audio [n], or why it is bad.

    Raises `UserError` where the tar cannot be read.
    """
    index = readable_index(tar) if index is None else index
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
class ShardReport:
    """The result of verifying a shard: good samples, their seconds, and what is bad."""

    shard: str
    samples: int
    seconds: float
    bad: tuple[DroppedSample, ...]


def verify_shard(
    tar: Path, max_seconds: float = 600.0, allow_empty_text: bool = False
) -> ShardReport:
    """Read and decode everything; compare with the index and the durations that the json claims."""
    good, seconds, bad = 0, 0.0, []
    try:
        index = local_index(tar)
    except OSError as error:
        return ShardReport(tar.name, 0, 0.0, (("unreadable", tar.name, "", str(error)),))
    for decoded in decode_shard(tar, max_seconds, index):
        if isinstance(decoded, BadSample):
            bad.append((decoded.cause, tar.name, decoded.key, decoded.detail))
            continue
        sample, wave = decoded
        actual = len(wave) / RATE
        if not sample.text.strip() and not allow_empty_text:
            bad.append(("empty_text", tar.name, sample.key, ""))
        elif sample.text.strip() and is_silent(wave.numpy()):
            bad.append(("silent_audio", tar.name, sample.key, "all samples are zero"))
        elif abs(sample.duration - actual) > max(0.1, 0.02 * actual):
            detail = f"json says {sample.duration:.3f} s, the audio has {actual:.3f} s"
            bad.append(("wrong_duration", tar.name, sample.key, detail))
        elif len(sample.text) > TRAINING.most_chars(actual):
            detail = f"{len(sample.text):,} characters in {actual:.2f} s"
            detail += TRAINING.limit_of("too_much_text")
            bad.append(("too_much_text", tar.name, sample.key, detail))
        else:
            good += 1
            seconds += actual
    bad += _check_index(tar, index)
    return ShardReport(tar.name, good, seconds, tuple(bad))


def _check_index(tar: Path, index: ShardIndex) -> list[DroppedSample]:
    path = index_path(tar)
    if not path.is_file():
        return [("missing_index", tar.name, "", "make the shard again")]
    try:
        written = load_index(path, str(tar))
    except (ValueError, OSError) as error:
        return [("bad_index", tar.name, "", str(error))]
    if written.tar_size is None:  # an index from before sizes were kept
        written.tar_size = index.tar_size
    if written.dump() != index.dump():
        return [("bad_index", tar.name, "", "it is not this tar's index")]
    return []


def verify(
    tars: Sequence[Path], processes: int | None = None, allow_empty_text: bool = False
) -> tuple[list[ShardReport], Counter[str]]:
    """Reports of all shards, and the number of bad samples by cause; with a progress bar."""
    work = partial(verify_shard, allow_empty_text=allow_empty_text)
    reports = list(map_in_processes(work, tars, processes, "verifying"))
    return reports, Counter(cause for report in reports for cause, *_ in report.bad)


def check_dataset(folder: Path, reports: Mapping[str, ShardReport]) -> list[DroppedSample]:
    """Contradictions between ``dataset.json`` of ``folder`` and its shards' reports (by name)."""
    bad: list[DroppedSample] = []
    try:
        listed = {row["name"]: row["samples"] for row in read_dataset(folder)["shards"]}
    except (UserError, KeyError, TypeError) as error:
        return [("bad_dataset", folder.name, "", str(error))]
    for name, samples in listed.items():
        if name not in reports:
            bad.append(("missing_shard", str(name), "", f"{samples} samples are gone with it"))
        else:
            report = reports[name]
            actual = report.samples + sum(1 for _, _, key, _ in report.bad if key)
            if actual < samples:
                detail = f"dataset.json says {samples} samples, the shard has {actual}"
                bad.append(("missing_samples", name, "", detail))
    bad += [
        ("unlisted_shard", name, "", "dataset.json lacks it")
        for name in reports
        if name not in listed
    ]
    return bad


def cmvn_sums(
    tar: Path, config: FbankConfig, max_seconds: float = 600.0
) -> tuple[CmvnSums, Counter[str]]:
    """Feature sums of one shard's usable samples, and a count of the others by cause."""
    sums, causes = CmvnSums(config.mels), Counter()
    for decoded in decode_shard(tar, max_seconds, rate=config.rate):
        if isinstance(decoded, BadSample):
            causes[decoded.cause] += 1
        else:
            sums.update(fbank(decoded[1], config))
    return sums, causes
