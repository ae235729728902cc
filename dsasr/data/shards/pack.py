"""Packs utterances into shards: in parallel, resumable, each shard whole or not at all."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from dsasr.data.audio.files import (
    ERRORS,
    FFMPEG,
    SNDFILE,
    AudioError,
    audio_seconds,
    check_scale,
    check_whole,
    claimed_frames,
    open_audio,
)
from dsasr.data.manifests.entry import ManifestEntry
from dsasr.data.shards.index import MAX_AUDIO, ShardIndex, index_path, load_index
from dsasr.data.shards.process_pool import map_in_processes
from dsasr.data.shards.sample import EXTENSIONS, DroppedSample
from dsasr.data.shards.writer import (
    PackedSample,
    read_dataset,
    sample_key,
    shard_summary,
    write_dataset,
    write_shard,
)
from dsasr.utils.errors import UserError
from dsasr.utils.hashing import hash64, repeated
from dsasr.utils.io import atomic_write, remove_temporaries

PLAN = "packing.json"
BAD = "bad_samples.jsonl"
MAX_SECONDS = 3600.0  # longest recording that is encoded anew, or whose samples are counted
# Audio is shorter than its manifest says if it is so by both: some manifests round to seconds.
LEAST_SHARE, MOST_SECONDS = 0.9, 0.5


@dataclass(frozen=True)
class PackConfig:
    """How to split a corpus into shards.

    ``shard_size``: samples per shard; ``shard_bytes``, where it is not 0, splits by about that many
    bytes of audio instead. ``shuffle`` by ``seed`` before splitting. ``encode`` None keeps the
    audio bytes unchanged, "flac" encodes all audio as FLAC.
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
    utterances: Sequence[ManifestEntry],
    out: Path,
    config: PackConfig,
    processes: int | None = None,
    left_out: Sequence[DroppedSample] = (),
) -> dict[str, Any]:
    """Write ``utterances`` as shards in ``out`` with ``dataset.json``; returns its values.

    After an interruption, another run writes only the missing shards; "written" counts those.
    Utterances whose audio cannot be read, or is much shorter than the manifest says, are left out,
    listed in ``bad_samples.jsonl`` after ``left_out`` (those that the corpus' reader left out), and
    counted under "bad"; "repaired" counts durations that the audio's header corrected. Audio that
    shards do not hold (AIFF, AU, and with ffmpeg M4A, WebM …) is encoded as FLAC; of audio that is
    kept unchanged only the header is read: `dsasr.data.shards.verify` decodes all of it.

    Raises `UserError` if ``out`` holds other shards or cannot be written, and for ids that give the
    same key.
    """
    _check_keys(utterances)
    sizes = _sizes(utterances)
    try:
        out.mkdir(parents=True, exist_ok=True)
        _claim(out, _identity(utterances, sizes, config), len(utterances))
        remove_temporaries(out)  # of a packer that was killed
        finished = _finished_dataset(out)
        if finished is not None:
            return {**finished, "written": 0}
        order = np.arange(len(utterances))
        if config.shuffle:
            np.random.Generator(np.random.PCG64(config.seed)).shuffle(order)
        parts = _split_into_shards(order, utterances, sizes, config)
        tasks = (
            (out / f"{number:06d}.tar", [utterances[i] for i in part])
            for number, part in enumerate(parts)
        )
        rows, bad, repaired, written = [], list(left_out), 0, 0
        work = partial(_pack_one, encode=config.encode)
        title = f"packing {out.name}"
        for row, note, new in map_in_processes(work, tasks, processes, title, total=len(parts)):
            rows.append(row)
            bad += [tuple(dropped) for dropped in note["bad"]]
            repaired += note["repaired"]
            written += new
        names = ("cause", "shard", "key", "detail")
        lines = [json.dumps(dict(zip(names, b, strict=True)), ensure_ascii=False) for b in bad]
        atomic_write(out / BAD, "".join(line + "\n" for line in lines))
        speakers = len({u.speaker for u in utterances if u.speaker})
        dataset = write_dataset(out, rows, speakers, bad=len(bad), repaired=repaired)
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror or error}") from None
    return {**dataset, "written": written}


def _check_keys(utterances: Sequence[ManifestEntry]) -> None:
    twice = repeated(hash64(sample_key(utterance.id)) for utterance in utterances)
    ids: dict[str, str] = {}
    for utterance in utterances if twice else ():
        if hash64(sample_key(utterance.id)) not in twice:
            continue
        first = ids.setdefault(sample_key(utterance.id), utterance.id)
        if first != utterance.id:
            raise UserError(f"the ids '{first}' and '{utterance.id}' give the same key: rename one")


def _sizes(utterances: Sequence[ManifestEntry]) -> np.ndarray:
    """Bytes of each utterance's recording [N] int64, which several utterances may share."""

    @lru_cache(maxsize=1024)
    def size(audio: Path) -> int:
        try:
            return audio.stat().st_size
        except OSError as error:
            raise UserError(f"{audio}: {error.strerror}") from None

    return np.fromiter((size(u.audio) for u in utterances), np.int64, len(utterances))


def _split_into_shards(
    order: np.ndarray, utterances: Sequence[ManifestEntry], sizes: np.ndarray, config: PackConfig
) -> list[np.ndarray]:
    if not config.shard_bytes:
        return np.split(order, range(config.shard_size, len(order), config.shard_size))
    estimated_bytes = np.array(
        [
            sizes[i]
            if (u := utterances[i]).start is None or u.end is None
            else int((u.end - u.start) * 20_000)  # FLAC of speech at 16 kHz
            for i in order
        ],
        np.int64,
    )
    number = (np.cumsum(estimated_bytes) - estimated_bytes) // config.shard_bytes
    return np.split(order, np.flatnonzero(np.diff(number)) + 1)


def _identity(utterances: Sequence[ManifestEntry], sizes: np.ndarray, config: PackConfig) -> str:
    """A hash of what is packed and how, without folders and times: a corpus may be moved."""
    identity = hashlib.sha256(repr(config).encode())
    for u, size in zip(utterances, sizes.tolist(), strict=True):
        fields = [u.id, u.audio.name, size, u.text, u.speaker, u.lang, u.start, u.end, u.extra]
        identity.update(json.dumps(fields, sort_keys=True).encode())
    return identity.hexdigest()[:16]


def _claim(out: Path, identity: str, utterances: int) -> None:
    """Note in ``out`` what is packed there; an interrupted run left the same note."""
    note = out / PLAN
    if note.is_file():
        try:
            noted = json.loads(note.read_text(encoding="utf-8"))["identity"]
        except (ValueError, KeyError, TypeError):
            noted = None
        if noted != identity:
            raise UserError(f"{out} holds other shards: choose another folder, or delete it first")
        return
    if next(out.glob("*.tar"), None) is not None:
        raise UserError(f"{out} holds shards already: choose another folder, or delete them first")
    atomic_write(note, json.dumps({"identity": identity, "utterances": utterances}))


def _finished_dataset(out: Path) -> dict[str, Any] | None:
    """``dataset.json``, which is written last, if all its shards exist in full size."""
    try:
        dataset = read_dataset(out)
        for row in dataset["shards"]:
            tar = out / row["name"]
            if tar.stat().st_size != row["bytes"] or not index_path(tar).is_file():
                return None
        return dataset if {"bad", "repaired"} <= dataset.keys() else None
    except (UserError, OSError, KeyError, TypeError):
        return None


def _pack_one(
    task: tuple[Path, list[ManifestEntry]], encode: str | None
) -> tuple[dict[str, Any], dict[str, Any], bool]:
    """A shard's summary, its note of dropped samples, and whether it was written now.

    The index is written last: it marks the shard as finished.
    """
    path, utterances = task
    note_path = path.with_suffix(".note.json")
    try:
        index = load_index(index_path(path), str(path))
        text = note_path.read_text(encoding="utf-8") if note_path.is_file() else None
        note = _empty_note() if text is None else json.loads(text)
        if len(index) + len(note["bad"]) == len(utterances) and _is_whole(path, index):
            return shard_summary(path, index), note, False
    except (OSError, ValueError, KeyError, TypeError):
        pass  # not finished, or damaged: written again
    note = _empty_note()

    def samples() -> Iterator[PackedSample]:
        for utterance in utterances:
            try:
                sample = _packed(utterance, encode)
            except AudioError as error:
                note["bad"].append((error.cause, path.name, utterance.id, error.detail))
                continue
            except (OSError, *ERRORS) as error:
                cause = "unreadable" if isinstance(error, OSError) else "decode_error"
                detail = getattr(error, "error_string", str(error))  # libsndfile's, or any other's
                note["bad"].append((cause, path.name, utterance.id, detail))
                continue
            claimed, actual = utterance.duration, sample.values["duration"]
            note["repaired"] += bool(claimed) and abs(claimed - actual) > max(0.1, 0.02 * actual)
            yield sample

    def write_note() -> None:
        if note != _empty_note():
            atomic_write(note_path, json.dumps(note, ensure_ascii=False))
        else:
            note_path.unlink(missing_ok=True)

    index = write_shard(path, samples(), before_index=write_note)
    return shard_summary(path, index), note, True


def _is_whole(path: Path, index: ShardIndex) -> bool:
    """Whether the tar exists and is as long as its index says."""
    if index.tar_size is not None:
        return path.stat().st_size == index.tar_size
    ends = [max(e.audio_offset + e.audio_size, e.json_offset + e.json_size) for e in index]
    return path.stat().st_size >= max(ends, default=0)


def _empty_note() -> dict[str, Any]:
    return {"bad": [], "repaired": 0}


def _packed(utterance: ManifestEntry, encode: str | None) -> PackedSample:
    kind = utterance.audio.suffix.lower().lstrip(".")
    if kind not in (*SNDFILE, *FFMPEG):
        known = ", ".join((*SNDFILE, *FFMPEG))
        raise AudioError("unknown_format", f"'{utterance.audio.name}' is none of {known}")
    whole = utterance.start is None
    if not whole or kind not in EXTENSIONS or (encode == "flac" and kind != "flac"):
        audio, seconds = _encoded(utterance)
        kind = "flac"
    else:
        audio = utterance.audio.read_bytes()
        if len(audio) > MAX_AUDIO:
            raise AudioError("too_long", f"{len(audio)} bytes")
        seconds = audio_seconds(audio) or _counted_seconds(audio)
    claimed = utterance.duration if whole else (utterance.end or 0.0) - utterance.start
    if seconds < min(LEAST_SHARE * claimed, claimed - MOST_SECONDS):
        detail = f"the manifest says {claimed:.3f} s, the audio has {seconds:.3f} s"
        raise AudioError("truncated_audio", detail)
    values = {"text": utterance.text, "lang": utterance.lang, "speaker": utterance.speaker}
    values |= {"duration": round(seconds, 4)} | utterance.extra
    return PackedSample(sample_key(utterance.id), kind, audio, values)


def _counted_seconds(audio: bytes) -> float:
    """The duration of audio whose header has none, by decoding it."""
    with open_audio(audio) as file:
        most, count = MAX_SECONDS * file.samplerate, 0
        while count <= most and (block := len(file.read(65_536, dtype="int16"))):
            count += block
        if count > most:
            raise AudioError("too_long", f"more than {MAX_SECONDS:g} s")
        if not count:
            raise AudioError("empty_audio", "no samples")
        return count / file.samplerate


def _encoded(utterance: ManifestEntry) -> tuple[bytes, float]:
    """16-bit FLAC of an utterance's part of its recording, at the recording's rate; seconds."""
    source: Path | bytes = utterance.audio
    if utterance.start is None and source.suffix.lower().lstrip(".") in SNDFILE:
        source = source.read_bytes()
        check_whole(source)
    with open_audio(source) as file:
        if not file.frames:
            raise AudioError("empty_audio", "no samples")
        rate = file.samplerate
        start = round((utterance.start or 0.0) * rate)
        most, claimed = start + int(MAX_SECONDS * rate) + 1, claimed_frames(file)
        ends = [most, *([claimed] if claimed else [])]
        stop = min(ends if utterance.end is None else [round(utterance.end * rate), *ends])
        if not 0 <= start < stop:
            detail = f"{utterance.start} to {utterance.end} s of {claimed / rate:.3f} s"
            raise AudioError("empty_audio", detail)
        if stop == most:
            raise AudioError("too_long", f"more than {MAX_SECONDS:g} s")
        file.seek(start)
        # libsndfile does not scale floats to integers, and loses a bit of the others if asked to.
        exact = file.subtype in ("PCM_16", "PCM_S8", "PCM_U8")
        wave = _read(file, stop - start, "int16" if exact else "float32")
    if claimed and len(wave) < stop - start:
        detail = f"ends after {len(wave)} of {stop - start} samples"
        raise AudioError("decode_error", detail)
    if not len(wave):
        raise AudioError("empty_audio", "no samples")
    if not exact:
        check_scale(wave)
        wave = np.clip(np.rint(wave * 32_768.0), -32_768, 32_767).astype(np.int16)
    buffer = io.BytesIO()
    soundfile.write(buffer, wave, rate, format="FLAC", subtype="PCM_16")
    return buffer.getvalue(), len(wave) / rate


def _read(file: soundfile.SoundFile, samples: int, kind: str) -> np.ndarray:
    """Up to ``samples`` of each channel, in blocks: a header may claim more than memory holds."""
    blocks, count = [], 0
    while count < samples:
        block = file.read(min(65_536, samples - count), dtype=kind)
        if not len(block):
            break
        blocks.append(block)
        count += len(block)
    return np.concatenate(blocks) if blocks else np.zeros(0, kind)
