"""Packs utterances into shards: in parallel, resumable, each shard whole or not at all."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from tqdm import tqdm

from dsasr.data.audio import RATE, AudioError, decode
from dsasr.data.manifests import Utterance, extension
from dsasr.data.shards import (
    EXTENSIONS,
    MAX_AUDIO,
    VERSION,
    ShardIndex,
    build_index,
    header_seconds,
    index_path,
    load_index,
)
from dsasr.errors import UserError
from dsasr.files import atomic_path, atomic_write

DATASET = "dataset.json"
PLAN = "packing.json"
BAD = "bad_samples.jsonl"
MAX_SECONDS = 3600.0  # longest recording that is encoded anew

Row = tuple[str, str, str, str]  # cause, shard, key, detail


@dataclass(frozen=True)
class Packed:
    """A sample to be written: ``audio`` bytes as they are, ``values`` for the json member."""

    key: str
    extension: str
    audio: bytes
    values: dict[str, Any]


def write_tar(path: str | os.PathLike, samples: Iterable[Packed]) -> ShardIndex:
    """Write a WebDataset tar, whole or not at all; the same samples give the same bytes.

    Raises `UserError` for samples that no reader could use: an odd or repeated key, no text.
    """
    import webdataset  # slow to import, and readers of shards do not need it

    with atomic_path(path) as temporary:
        with open(temporary, "wb") as file:
            writer = webdataset.TarWriter(file, encoder=False, user="dsasr", group="dsasr", mtime=0)
            for sample in samples:
                if sample.key != key_of(sample.key):
                    raise UserError(f"'{sample.key}' cannot be a key: a dot ends a WebDataset key")
                if sample.extension not in EXTENSIONS:
                    raise UserError(f"{sample.key}: '{sample.extension}' is no known audio")
                data = json.dumps(sample.values, ensure_ascii=False).encode("utf-8")
                writer.write({"__key__": sample.key, sample.extension: sample.audio, "json": data})
            writer.close()
        index = build_index(temporary, str(path))
        if index.bad:
            raise UserError(f"not written: {index.bad[0]}")
    return index


def write_shard(path: str | os.PathLike, samples: Iterable[Packed]) -> ShardIndex:
    """Write ``path`` and then its index, each whole or not at all. Raises as `write_tar`."""
    index = write_tar(path, samples)
    atomic_write(index_path(path), index.dump())
    return index


def key_of(name: str) -> str:
    """The key of an utterance's id: WebDataset ends keys at a dot, and none is an absolute path.

    Raises `UserError` where nothing that can be a key is left.
    """
    key = name.replace(".", "_").lstrip("/")
    if not key or not key.isprintable():  # lone surrogates and control characters do not print
        raise UserError(f"the id {name!r} cannot be a key: use printable characters")
    return key


def shard_summary(path: Path, index: ShardIndex) -> dict[str, Any]:
    """One shard's row of dataset.json, with what is summed over shards."""
    langs: Counter[str] = Counter()
    seconds: Counter[str] = Counter()
    for entry in index:
        langs[entry.lang] += 1
        seconds[entry.lang] += entry.duration
    return {
        "name": path.name,
        "samples": len(index),
        "seconds": round(sum(seconds.values()), 3),
        "bytes": path.stat().st_size,
        "langs": {k: [langs[k], round(seconds[k], 3)] for k in sorted(langs)},
    }


def write_dataset(folder: Path, rows: Sequence[Mapping[str, Any]], speakers: int) -> dict[str, Any]:
    """``dataset.json``: the shards, counts and hours, over all and by language."""
    langs: dict[str, list[float]] = {}
    for row in rows:
        for lang, (samples, seconds) in row["langs"].items():
            held = langs.setdefault(lang, [0, 0.0])
            held[0] += samples
            held[1] += seconds
    values = {
        "version": VERSION,
        "shards": [{k: v for k, v in row.items() if k != "langs"} for row in rows],
        "samples": sum(row["samples"] for row in rows),
        "hours": round(sum(row["seconds"] for row in rows) / 3600, 4),
        "langs": {
            lang: {"samples": int(samples), "hours": round(seconds / 3600, 4)}
            for lang, (samples, seconds) in sorted(langs.items())
        },
        "speakers": speakers,
    }
    atomic_write(folder / DATASET, json.dumps(values, indent=1, ensure_ascii=False))
    return values


def read_dataset(folder: str | os.PathLike) -> dict[str, Any]:
    """``dataset.json`` of a folder. Raises `UserError`."""
    path = Path(folder) / DATASET
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values["version"] != VERSION:
            raise ValueError(f"version {values['version']}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} cannot be used ({error}): pack it with tools/make_shards.py"
        ) from None
    return values


@dataclass(frozen=True)
class PackConfig:
    """How to cut a corpus into shards.

    ``shard_size``: samples a shard; ``shard_bytes``, where it is not 0, cuts by about so many bytes
    of audio instead. ``shuffle`` by ``seed`` before cutting. ``encode`` None keeps the audio bytes
    as they are, "flac" writes all as FLAC.
    """

    shard_size: int = 500
    shuffle: bool = True
    seed: int = 0
    encode: str | None = None
    shard_bytes: int = 0

    def __post_init__(self) -> None:
        if self.shard_size < 1 or self.shard_bytes < 0:
            raise UserError("the shard size must be at least 1")
        if self.encode not in (None, "flac"):
            raise UserError(f"encode '{self.encode}': use flac, or leave it out")


def shard_size(text: str) -> tuple[int, int]:
    """``500`` → (500 samples, 0), ``200MB`` → (500, 200,000,000 bytes). Raises `UserError`."""
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("KB", 10**3)):
        if text.upper().endswith(unit):
            number, scale = text[:-2], factor
            break
    else:
        number, scale = text, 0
    try:
        value = float(number) if scale else int(number)
        if not 0 < value < 1e9:
            raise ValueError
    except ValueError:
        raise UserError(f"shard size '{text}': say how many samples, or 200MB or 1GB") from None
    return (500, int(value * scale)) if scale else (int(value), 0)


def pack(
    utterances: Sequence[Utterance],
    out: Path,
    config: PackConfig,
    processes: int | None = None,
    left_out: Sequence[Row] = (),
) -> dict[str, Any]:
    """Write ``utterances`` as shards in ``out`` with ``dataset.json``; returns its values.

    Run again after a stop, it writes only what is missing. Utterances whose audio cannot be read
    are left out, listed in ``bad_samples.jsonl`` after ``left_out`` (what the corpus' reader left
    out), and counted under "bad"; "repaired" counts durations that the audio's header corrected.
    Raises `UserError` if ``out`` holds other shards or cannot be written, and for ids that give the
    same key.
    """
    keys = {}
    for utterance in utterances:
        extension(utterance.audio)
        other = keys.setdefault(key_of(utterance.id), utterance.id)
        if other != utterance.id:
            raise UserError(f"the ids '{other}' and '{utterance.id}' give the same key: rename one")
    order = np.arange(len(utterances))
    if config.shuffle:
        np.random.Generator(np.random.PCG64(config.seed)).shuffle(order)
    tasks = [
        (out / f"{number:06d}.tar", [utterances[i] for i in part])
        for number, part in enumerate(_cut_up(order, utterances, config))
    ]
    rows, bad, repaired = [], list(left_out), 0
    try:
        out.mkdir(parents=True, exist_ok=True)
        _claim(out, utterances, config)
        count = min(processes or os.cpu_count() or 1, len(tasks))
        with ProcessPoolExecutor(count) as pool:
            done = pool.map(partial(_pack_one, encode=config.encode), tasks)
            for row, note in tqdm(done, total=len(tasks), desc="packing", unit="shard"):
                rows.append(row)
                bad += [tuple(held) for held in note["bad"]]
                repaired += note["repaired"]
        names = ("cause", "shard", "key", "detail")
        lines = [json.dumps(dict(zip(names, b, strict=True)), ensure_ascii=False) for b in bad]
        atomic_write(out / BAD, "".join(line + "\n" for line in lines))
        made = write_dataset(out, rows, len({u.speaker for u in utterances if u.speaker}))
    except BrokenProcessPool:
        raise UserError(
            "a packing process was killed, for want of memory perhaps: run again with fewer "
            "--processes, what is done stays done"
        ) from None
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror or error}") from None
    return {**made, "bad": len(bad), "repaired": repaired}


def _cut_up(
    order: np.ndarray, utterances: Sequence[Utterance], config: PackConfig
) -> list[np.ndarray]:
    if not config.shard_bytes:
        return np.split(order, range(config.shard_size, len(order), config.shard_size))
    sizes = np.array([_about_bytes(utterances[i]) for i in order], np.int64)
    number = (np.cumsum(sizes) - sizes) // config.shard_bytes
    return np.split(order, np.flatnonzero(np.diff(number)) + 1)


def _about_bytes(utterance: Utterance) -> int:
    if utterance.start is not None and utterance.end is not None:
        return int((utterance.end - utterance.start) * 20_000)  # FLAC of speech at 16 kHz
    return utterance.audio.stat().st_size


def _claim(out: Path, utterances: Sequence[Utterance], config: PackConfig) -> None:
    """Note what is packed here, or find the same note from an earlier, stopped run."""
    identity = hashlib.sha256(repr(config).encode())
    for u in utterances:
        told = [u.id, u.audio.name, u.text, u.speaker, u.lang, u.start, u.end, u.extra]
        identity.update(json.dumps(told, sort_keys=True).encode())
    value, note = identity.hexdigest()[:16], out / PLAN
    if note.is_file():
        try:
            held = json.loads(note.read_text(encoding="utf-8"))["identity"]
        except (ValueError, KeyError, TypeError):
            held = None
        if held != value:
            raise UserError(f"{out} holds other shards: choose another --out, or delete it first")
    elif next(out.glob("*.tar"), None) is not None:
        raise UserError(f"{out} holds shards already: choose another --out, or delete them first")
    atomic_write(note, json.dumps({"identity": value, "utterances": len(utterances)}))


def _pack_one(
    task: tuple[Path, list[Utterance]], encode: str | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """A shard's summary and its note: what was left out. The index comes last: then it is done."""
    path, utterances = task
    note = path.with_suffix(".note.json")
    try:
        index = load_index(index_path(path), str(path))
        held = json.loads(note.read_text(encoding="utf-8")) if note.is_file() else _empty_note()
        if len(index) + len(held["bad"]) == len(utterances):
            return shard_summary(path, index), held
    except (OSError, ValueError):
        pass  # not whole: made again
    held = _empty_note()

    def samples() -> Iterator[Packed]:
        for utterance in utterances:
            try:
                packed = _packed(utterance, encode)
            except (soundfile.LibsndfileError, OSError, AudioError) as error:
                cause = error.cause if isinstance(error, AudioError) else "unreadable"
                if isinstance(error, soundfile.LibsndfileError):
                    cause = "decode_error"
                held["bad"].append((cause, path.name, utterance.id, str(error)))
                continue
            claimed, real = utterance.duration, packed.values["duration"]
            held["repaired"] += bool(claimed) and abs(claimed - real) > max(0.1, 0.02 * real)
            yield packed

    index = write_tar(path, samples())
    if held != _empty_note():
        atomic_write(note, json.dumps(held, ensure_ascii=False))
    else:
        note.unlink(missing_ok=True)
    atomic_write(index_path(path), index.dump())
    return shard_summary(path, index), held


def _empty_note() -> dict[str, Any]:
    return {"bad": [], "repaired": 0}


def _packed(utterance: Utterance, encode: str | None) -> Packed:
    kind = extension(utterance.audio)
    if utterance.start is not None or (encode == "flac" and kind != "flac"):
        audio, seconds = _encoded(utterance)
        kind = "flac"
    else:
        audio = utterance.audio.read_bytes()
        if len(audio) > MAX_AUDIO:
            raise AudioError("too_long", f"{len(audio)} bytes")
        seconds = header_seconds(io.BytesIO(audio))
        if not seconds:  # no samples, or none that the header knows of
            seconds = len(decode(audio, max_seconds=MAX_SECONDS)) / RATE
    values = {"text": utterance.text, "lang": utterance.lang, "speaker": utterance.speaker}
    values |= {"duration": round(seconds, 4)} | utterance.extra
    return Packed(key_of(utterance.id), kind, audio, values)


def _encoded(utterance: Utterance) -> tuple[bytes, float]:
    """FLAC of 16 bits of an utterance's part of its recording, at the recording's rate."""
    with soundfile.SoundFile(str(utterance.audio)) as file:
        rate = file.samplerate
        start = round((utterance.start or 0.0) * rate)
        stop = (
            file.frames if utterance.end is None else min(round(utterance.end * rate), file.frames)
        )
        if not 0 <= start < stop:
            detail = f"{utterance.start} to {utterance.end} s of {file.frames / rate:.3f} s"
            raise AudioError("empty_audio", detail)
        if stop - start > MAX_SECONDS * rate:
            raise AudioError("too_long", f"more than {MAX_SECONDS:g} s")
        file.seek(start)
        # libsndfile does not scale floats to integers, and loses a bit of the others if asked to.
        exact = file.subtype in ("PCM_16", "PCM_S8", "PCM_U8")
        wave = file.read(stop - start, dtype="int16" if exact else "float32")
    if len(wave) < stop - start:
        raise AudioError("decode_error", f"ends after {len(wave)} of {stop - start} samples")
    if not exact:
        if not np.isfinite(wave).all():
            raise AudioError("nan_audio", "samples that are not finite")
        wave = np.clip(np.rint(wave * 32_768.0), -32_768, 32_767).astype(np.int16)
    buffer = io.BytesIO()
    soundfile.write(buffer, wave, rate, format="FLAC", subtype="PCM_16")
    return buffer.getvalue(), len(wave) / rate
