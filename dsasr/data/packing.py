"""Pack utterances into shards: in parallel, resumable, whole or not at all; and check shards."""

from __future__ import annotations

import io
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from tqdm import tqdm

from dsasr.config import fingerprint
from dsasr.data import shards
from dsasr.data.audio import AudioError, CmvnSums, FbankConfig, decode, fbank
from dsasr.data.manifests import Utterance, extension, header_seconds
from dsasr.data.shards import BadSample, Packed, ShardIndex, read_sample
from dsasr.errors import UserError
from dsasr.files import atomic_write

PLAN = "packing.json"


@dataclass(frozen=True)
class PackConfig:
    """``shard_size`` samples a shard; ``shuffle`` by ``seed`` before cutting; ``encode`` None keeps
    the audio bytes as they are, "flac" writes all as FLAC."""

    shard_size: int = 500
    shuffle: bool = True
    seed: int = 0
    encode: str | None = None

    def __post_init__(self) -> None:
        if self.shard_size < 1:
            raise UserError("the shard size must be at least 1")
        if self.encode not in (None, "flac"):
            raise UserError(f"encode '{self.encode}': use flac, or leave it out")


def pack(
    utterances: Sequence[Utterance], out: Path, config: PackConfig, processes: int | None = None
) -> dict[str, Any]:
    """Write ``utterances`` as shards in ``out`` with ``dataset.json``; returns its values.

    Run again after a stop, it writes only what is missing. Utterances whose audio cannot be read
    are left out, listed in ``bad_samples.jsonl`` and counted under "bad". Raises `UserError` if
    ``out`` holds shards of something else.
    """
    for utterance in utterances:
        extension(utterance.audio)
    order = np.arange(len(utterances))
    if config.shuffle:
        np.random.Generator(np.random.PCG64(config.seed)).shuffle(order)
    cuts = range(0, len(order), config.shard_size)
    tasks = [
        (out / f"{number:06d}.tar", [utterances[i] for i in order[start : start + config.shard_size]])
        for number, start in enumerate(cuts)
    ]
    out.mkdir(parents=True, exist_ok=True)
    _claim(out, utterances, config)
    rows, bad = [], []
    with ProcessPoolExecutor(processes or os.cpu_count()) as pool:
        done = pool.map(partial(_pack_one, encode=config.encode), tasks)
        for row, dropped in tqdm(done, total=len(tasks), desc="packing", unit="shard"):
            rows.append(row)
            bad += dropped
    lines = [json.dumps(dict(zip(("cause", "shard", "key", "detail"), b, strict=True)),
                        ensure_ascii=False) for b in bad]  # fmt: skip
    atomic_write(out / "bad_samples.jsonl", "".join(line + "\n" for line in lines))
    speakers = len({u.speaker for u in utterances})
    return {**shards.write_dataset(out, rows, speakers), "bad": len(bad)}


def _claim(out: Path, utterances: Sequence[Utterance], config: PackConfig) -> None:
    """Note what is packed here, or find the same note from an earlier, stopped run."""
    identity = fingerprint([config, [[u.id, u.text] for u in utterances]])
    note = out / PLAN
    if note.is_file():
        if json.loads(note.read_text(encoding="utf-8")).get("identity") != identity:
            raise UserError(f"{out} holds other shards: choose another --out, or delete it first")
    elif next(out.glob("*.tar"), None) is not None:
        raise UserError(f"{out} holds shards already: choose another --out, or delete them first")
    atomic_write(note, json.dumps({"identity": identity, "utterances": len(utterances)}))


def _pack_one(
    task: tuple[Path, list[Utterance]], encode: str | None
) -> tuple[dict[str, Any], list[tuple[str, str, str, str]]]:
    path, utterances = task
    note = path.with_suffix(".bad.json")
    if path.is_file() and shards.index_path(path).is_file():
        index = shards.load_index(shards.index_path(path), str(path))
        held = json.loads(note.read_text(encoding="utf-8")) if note.is_file() else []
        return shards.shard_summary(path, index), [tuple(row) for row in held]
    bad: list[tuple[str, str, str, str]] = []

    def samples() -> Iterator[Packed]:
        for utterance in utterances:
            try:
                yield _packed(utterance, encode)
            except (soundfile.LibsndfileError, OSError, AudioError) as error:
                cause = error.cause if isinstance(error, AudioError) else "decode_error"
                bad.append((cause, path.name, utterance.id, str(error)))

    index = shards.write_shard(path, samples())
    if bad:
        atomic_write(note, json.dumps(bad, ensure_ascii=False))
    return shards.shard_summary(path, index), bad


def _packed(utterance: Utterance, encode: str | None) -> Packed:
    kind = extension(utterance.audio)
    seconds = utterance.duration
    if utterance.start is not None:
        audio, seconds = _cut(utterance)
        kind = "flac"
    elif encode == "flac" and kind != "flac":
        wave, rate = soundfile.read(str(utterance.audio), dtype="int16")
        audio, seconds, kind = _flac(wave, rate), len(wave) / rate, "flac"
    else:
        audio = utterance.audio.read_bytes()
        seconds = seconds or header_seconds(utterance.audio)
    values = {"text": utterance.text, "lang": utterance.lang, "speaker": utterance.speaker}
    # A key must have no dot: that is where WebDataset's keys end.
    return Packed(
        utterance.id.replace(".", "_"), kind, audio, values | {"duration": round(seconds, 4)} | utterance.extra
    )


def _cut(utterance: Utterance) -> tuple[bytes, float]:
    with soundfile.SoundFile(str(utterance.audio)) as file:
        start = int(round((utterance.start or 0.0) * file.samplerate))
        stop = file.frames if utterance.end is None else int(round(utterance.end * file.samplerate))
        if not 0 <= start < min(stop, file.frames):
            raise AudioError("empty_audio", f"{utterance.start} to {utterance.end} s of {file.frames} samples")
        file.seek(start)
        wave = file.read(min(stop, file.frames) - start, dtype="int16")
        return _flac(wave, file.samplerate), len(wave) / file.samplerate


def _flac(wave: np.ndarray, rate: int) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, wave, rate, format="FLAC", subtype="PCM_16")
    return buffer.getvalue()


# ------------------------------------------------------------------------------- reading them all


def each_wave(tar: Path, max_seconds: float) -> Iterator[tuple[str, Any]]:
    """(key, wave or `BadSample`) of every sample of a shard, and of what its index says is bad."""
    index: ShardIndex = shards.build_index(tar)
    yield from ((bad.key, bad) for bad in index.bad)
    for entry in index:
        try:
            sample = read_sample(tar, entry)
            yield entry.key, (sample, decode(sample.audio, max_seconds=max_seconds))
        except BadSample as error:
            yield entry.key, error
        except AudioError as error:
            yield entry.key, BadSample(error.cause, str(tar), entry.key, error.detail)


@dataclass(frozen=True)
class Verdict:
    """What verifying a shard found."""

    shard: str
    samples: int
    seconds: float
    bad: tuple[tuple[str, str, str, str], ...]


def verify_shard(tar: Path, max_seconds: float = 600.0) -> Verdict:
    """Read and decode everything; compare with the index and the durations that it claims."""
    good, seconds, bad = 0, 0.0, []
    for key, found in each_wave(tar, max_seconds):
        if isinstance(found, BadSample):
            bad.append((found.cause, tar.name, key, found.detail))
            continue
        sample, wave = found
        actual = len(wave) / 16_000
        if not sample.text.strip():
            bad.append(("empty_text", tar.name, key, ""))
        elif sample.duration and abs(sample.duration - actual) > max(0.1, 0.02 * actual):
            detail = f"json says {sample.duration:.3f} s, the audio has {actual:.3f} s"
            bad.append(("wrong_duration", tar.name, key, detail))
        else:
            good += 1
            seconds += actual
    bad += _check_index(tar)
    return Verdict(tar.name, good, seconds, tuple(bad))


def _check_index(tar: Path) -> list[tuple[str, str, str, str]]:
    path = shards.index_path(tar)
    if not path.is_file():
        return [("missing_index", tar.name, "", "make the shard again")]
    try:
        held = shards.load_index(path, str(tar))
    except (ValueError, TypeError) as error:
        return [("bad_index", tar.name, "", str(error))]
    if held.dump() != shards.build_index(tar).dump():
        return [("bad_index", tar.name, "", "it is not this tar's index")]
    return []


def verify(
    tars: Sequence[Path], processes: int | None = None, allow_empty_text: bool = False
) -> tuple[list[Verdict], Counter]:
    """Verdicts of all shards and the count of bad samples by cause; with a progress bar."""
    with ProcessPoolExecutor(processes or os.cpu_count()) as pool:
        done = pool.map(verify_shard, tars)
        verdicts = list(tqdm(done, total=len(tars), desc="verifying", unit="shard"))
    causes = Counter(b[0] for v in verdicts for b in v.bad)
    if allow_empty_text:
        causes.pop("empty_text", None)
    return verdicts, causes


def cmvn_sums(tar: Path, config: FbankConfig, max_seconds: float = 60.0) -> CmvnSums:
    """Feature sums of one shard's usable samples."""
    sums = CmvnSums(config.mels)
    for _, found in each_wave(tar, max_seconds):
        if not isinstance(found, BadSample):
            sums.update(fbank(found[1], config))
    return sums


def find_tars(paths: Iterable[str | Path]) -> list[Path]:
    """Local tars of files and folders, sorted. Raises `UserError` if there is none."""
    found: list[Path] = []
    for path in map(Path, paths):
        if not path.exists():
            raise UserError(f"there is no {path}")
        found += sorted(path.glob("*.tar")) if path.is_dir() else [path]
    if not found:
        raise UserError(f"no .tar in {', '.join(map(str, paths))}")
    return found
