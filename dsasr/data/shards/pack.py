"""Packs utterances into shards: in parallel, resumable, each shard whole or not at all."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from dsasr.data.shards.index import (
    MAX_AUDIO,
    BadSample,
    ShardIndex,
    header_seconds,
    index_path,
    load_index,
)
from dsasr.data.shards.manifests import Utterance, extension
from dsasr.data.shards.process_pool import each
from dsasr.data.shards.writer import (
    Packed,
    key_of,
    read_dataset,
    shard_summary,
    write_dataset,
    write_tar,
)
from dsasr.utils.errors import UserError
from dsasr.utils.io import atomic_write

PLAN = "packing.json"
BAD = "bad_samples.jsonl"
MAX_SECONDS = 3600.0  # longest recording that is encoded anew, or whose samples are counted

Row = tuple[str, str, str, str]  # cause, shard, key, detail


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
        if self.seed < 0:
            raise UserError(f"seed {self.seed}: must not be negative")
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

    Run again after a stop, it writes only what is missing; "written" counts these shards, 0 where
    all was there. Utterances whose audio cannot be read are left out, listed in
    ``bad_samples.jsonl`` after ``left_out`` (what the corpus' reader left out), and counted under
    "bad"; "repaired" counts durations that the audio's header corrected. Audio that is kept as it
    is has only its header read: `dsasr.data.shards.verify` decodes all of it.

    Raises `UserError` if ``out`` holds other shards or cannot be written, and for ids that give the
    same key.
    """
    _check_keys(utterances)
    sizes = _sizes(utterances)
    try:
        out.mkdir(parents=True, exist_ok=True)
        _claim(out, _identity(utterances, sizes, config), len(utterances))
        packed = _packed_already(out)
        if packed is not None:
            return {**packed, "written": 0}
        order = np.arange(len(utterances))
        if config.shuffle:
            np.random.Generator(np.random.PCG64(config.seed)).shuffle(order)
        tasks = [
            (out / f"{number:06d}.tar", [utterances[i] for i in part])
            for number, part in enumerate(_cut_up(order, utterances, sizes, config))
        ]
        rows, bad, repaired, written = [], list(left_out), 0, 0
        work = partial(_pack_one, encode=config.encode)
        for row, note, new in each(work, tasks, processes, f"packing {out.name}"):
            rows.append(row)
            bad += [tuple(held) for held in note["bad"]]
            repaired += note["repaired"]
            written += new
        names = ("cause", "shard", "key", "detail")
        lines = [json.dumps(dict(zip(names, b, strict=True)), ensure_ascii=False) for b in bad]
        atomic_write(out / BAD, "".join(line + "\n" for line in lines))
        speakers = len({u.speaker for u in utterances if u.speaker})
        made = write_dataset(out, rows, speakers, bad=len(bad), repaired=repaired)
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror or error}") from None
    return {**made, "written": written}


def _check_keys(utterances: Sequence[Utterance]) -> None:
    ids: dict[str, str] = {}
    for utterance in utterances:
        extension(utterance.audio)
        other = ids.setdefault(key_of(utterance.id), utterance.id)
        if other != utterance.id:
            raise UserError(f"the ids '{other}' and '{utterance.id}' give the same key: rename one")


def _sizes(utterances: Sequence[Utterance]) -> list[int]:
    """Bytes of the recordings, several utterances of which may lie in one."""
    known: dict[Path, int] = {}
    for utterance in utterances:
        if utterance.audio not in known:
            try:
                known[utterance.audio] = utterance.audio.stat().st_size
            except OSError as error:
                raise UserError(f"{utterance.audio}: {error.strerror}") from None
    return [known[utterance.audio] for utterance in utterances]


def _cut_up(
    order: np.ndarray, utterances: Sequence[Utterance], sizes: Sequence[int], config: PackConfig
) -> list[np.ndarray]:
    if not config.shard_bytes:
        return np.split(order, range(config.shard_size, len(order), config.shard_size))
    about = np.array(
        [
            sizes[i]
            if (u := utterances[i]).start is None or u.end is None
            else int((u.end - u.start) * 20_000)  # FLAC of speech at 16 kHz
            for i in order
        ],
        np.int64,
    )
    number = (np.cumsum(about) - about) // config.shard_bytes
    return np.split(order, np.flatnonzero(np.diff(number)) + 1)


def _identity(utterances: Sequence[Utterance], sizes: Sequence[int], config: PackConfig) -> str:
    """What is packed and how. Folders and times do not count: a corpus may be moved or copied."""
    identity = hashlib.sha256(repr(config).encode())
    for u, size in zip(utterances, sizes, strict=True):
        told = [u.id, u.audio.name, size, u.text, u.speaker, u.lang, u.start, u.end, u.extra]
        identity.update(json.dumps(told, sort_keys=True).encode())
    return identity.hexdigest()[:16]


def _claim(out: Path, identity: str, utterances: int) -> None:
    """Note what is packed here, or find the same note from an earlier, stopped run."""
    note = out / PLAN
    if note.is_file():
        try:
            held = json.loads(note.read_text(encoding="utf-8"))["identity"]
        except (ValueError, KeyError, TypeError):
            held = None
        if held != identity:
            raise UserError(f"{out} holds other shards: choose another folder, or delete it first")
        return
    if next(out.glob("*.tar"), None) is not None:
        raise UserError(f"{out} holds shards already: choose another folder, or delete them first")
    atomic_write(note, json.dumps({"identity": identity, "utterances": utterances}))


def _packed_already(out: Path) -> dict[str, Any] | None:
    """``dataset.json``, which is written last, if all that it lists is there in full size."""
    try:
        made = read_dataset(out)
        for row in made["shards"]:
            tar = out / row["name"]
            if tar.stat().st_size != row["bytes"] or not index_path(tar).is_file():
                return None
        return made if {"bad", "repaired"} <= made.keys() else None
    except (UserError, OSError, KeyError, TypeError):
        return None


def _pack_one(
    task: tuple[Path, list[Utterance]], encode: str | None
) -> tuple[dict[str, Any], dict[str, Any], bool]:
    """A shard's summary, its note of what was left out, and whether it was written.

    The index comes last: then the shard is done.
    """
    path, utterances = task
    note = path.with_suffix(".note.json")
    try:
        index = load_index(index_path(path), str(path))
        held = json.loads(note.read_text(encoding="utf-8")) if note.is_file() else _empty_note()
        if len(index) + len(held["bad"]) == len(utterances) and _is_whole(path, index):
            return shard_summary(path, index), held, False
    except (OSError, ValueError, KeyError, TypeError):
        pass  # not whole: made again
    held = _empty_note()

    def samples() -> Iterator[Packed]:
        for utterance in utterances:
            try:
                packed = _packed(utterance, encode)
            except (OSError, RuntimeError, ValueError) as error:  # soundfile's are the last two
                cause = "unreadable" if isinstance(error, OSError) else "decode_error"
                detail = getattr(error, "error_string", str(error))  # libsndfile's, or any other's
                held["bad"].append((cause, path.name, utterance.id, detail))
                continue
            except BadSample as error:
                held["bad"].append((error.cause, path.name, utterance.id, error.detail))
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
    return shard_summary(path, index), held, True


def _is_whole(path: Path, index: ShardIndex) -> bool:
    """Whether the tar is there and as long as its index says."""
    ends = [max(e.audio_offset + e.audio_size, e.json_offset + e.json_size) for e in index]
    return path.stat().st_size >= max(ends, default=0)


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
            raise BadSample("too_long", "", utterance.id, f"{len(audio)} bytes")
        seconds = header_seconds(io.BytesIO(audio)) or _counted_seconds(audio, utterance.id)
    values = {"text": utterance.text, "lang": utterance.lang, "speaker": utterance.speaker}
    values |= {"duration": round(seconds, 4)} | utterance.extra
    return Packed(key_of(utterance.id), kind, audio, values)


def _counted_seconds(audio: bytes, key: str) -> float:
    """The duration of audio whose header tells none."""
    with soundfile.SoundFile(io.BytesIO(audio)) as file:
        most, count = MAX_SECONDS * file.samplerate, 0
        while count <= most and (block := len(file.read(65_536, dtype="int16"))):
            count += block
        if count > most:
            raise BadSample("too_long", "", key, f"more than {MAX_SECONDS:g} s")
        if not count:
            raise BadSample("empty_audio", "", key, "no samples")
        return count / file.samplerate


def _encoded(utterance: Utterance) -> tuple[bytes, float]:
    """FLAC of 16 bits of an utterance's part of its recording, at the recording's rate."""

    def bad(cause: str, detail: str) -> BadSample:
        return BadSample(cause, "", utterance.id, detail)

    with soundfile.SoundFile(os.fspath(utterance.audio)) as file:
        rate = file.samplerate
        start = round((utterance.start or 0.0) * rate)
        stop = (
            file.frames if utterance.end is None else min(round(utterance.end * rate), file.frames)
        )
        if not 0 <= start < stop:
            detail = f"{utterance.start} to {utterance.end} s of {file.frames / rate:.3f} s"
            raise bad("empty_audio", detail)
        if stop - start > MAX_SECONDS * rate:
            raise bad("too_long", f"more than {MAX_SECONDS:g} s")
        file.seek(start)
        # libsndfile does not scale floats to integers, and loses a bit of the others if asked to.
        exact = file.subtype in ("PCM_16", "PCM_S8", "PCM_U8")
        wave = file.read(stop - start, dtype="int16" if exact else "float32")
    if len(wave) < stop - start:
        raise bad("decode_error", f"ends after {len(wave)} of {stop - start} samples")
    if not exact:
        if not np.isfinite(wave).all():
            raise bad("nan_audio", "samples that are not finite")
        wave = np.clip(np.rint(wave * 32_768.0), -32_768, 32_767).astype(np.int16)
    buffer = io.BytesIO()
    soundfile.write(buffer, wave, rate, format="FLAC", subtype="PCM_16")
    return buffer.getvalue(), len(wave) / rate
