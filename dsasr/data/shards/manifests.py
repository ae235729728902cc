"""Readers of corpora on disk: JSONL manifests, Kaldi folders, LibriSpeech and AISHELL-1 trees."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dsasr.data.shards.index import EXTENSIONS, DroppedSample
from dsasr.utils.errors import UserError
from dsasr.utils.progress import Bar


@dataclass(frozen=True)
class ManifestEntry:
    """One utterance of a corpus. ``start`` and ``end`` (s) cut it out of a longer recording."""

    id: str
    audio: Path
    text: str
    speaker: str = ""
    lang: str = ""
    duration: float = 0.0  # seconds as the manifest claims; 0: it claims none
    start: float | None = None
    end: float | None = None
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Manifest:
    """A corpus: its utterances, and those that are left out of it as (cause, file, id, detail)."""

    utterances: list[ManifestEntry]
    left_out: tuple[DroppedSample, ...] = ()


def read_manifest(path: str | Path, kind: str = "auto", lang: str = "") -> Manifest:
    """The utterances of ``path``: ``kind`` is jsonl, kaldi, librispeech, aishell or auto.

    ``lang`` is the language of those that name none. Recordings of a Kaldi folder or a tree that
    have no transcript are left out and named. Raises `UserError` for a malformed corpus, for a tree
    with more than one of training, development and test data, for a repeated id, and for missing
    audio.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"there is no {path}")
    if kind == "auto":
        kind = _guess(path)
    readers = {
        "jsonl": _jsonl, "kaldi": _kaldi, "librispeech": _librispeech, "aishell": _aishell
    }  # fmt: skip
    if kind not in readers:
        raise UserError(f"unknown manifest kind '{kind}': use {', '.join(readers)}")
    defaults = {"librispeech": "en", "aishell": "zh"}
    left_out: list[DroppedSample] = []
    utterances = list(readers[kind](path, lang or defaults.get(kind, ""), left_out))
    if not utterances:
        raise UserError(f"{path} holds no utterance")
    if kind in ("librispeech", "aishell"):
        _check_one_split(path, utterances)
    ids: set[str] = set()
    missing = []
    for utterance in Bar(utterances, desc="checking audio", unit="file", delay=3):
        if utterance.id in ids:
            raise UserError(f"{path} has two utterances with the id '{utterance.id}'")
        ids.add(utterance.id)
        _check_times(path, utterance)
        if not utterance.audio.is_file():
            missing.append(utterance.audio)
    if missing:
        raise UserError(
            f"{path}: {len(missing)} of {len(utterances)} audio files are missing, "
            f"the first is {missing[0]}"
        )
    return Manifest(utterances, tuple(left_out))


_SPLIT = re.compile(r"(train|dev|test)(-.*)?")  # train-clean-100, dev …


def _check_one_split(path: Path, utterances: list[ManifestEntry]) -> None:
    """Raise `UserError` for a tree that holds, say, the test set beside the training data."""
    splits: dict[str, Path] = {}  # train, dev, test → the first folder of its kind
    for parent in dict.fromkeys(utterance.audio.parent for utterance in utterances):
        folder = path
        for part in parent.relative_to(path).parts:
            folder = folder / part
            if found := _SPLIT.fullmatch(part):
                splits.setdefault(found[1], folder)
    if len(splits) > 1:
        raise UserError(
            f"{path} holds {', '.join(sorted(splits))} data, which must stay apart: pack each "
            f"split's folder alone, such as {min(splits.values())}"
        )


def _check_times(path: Path, utterance: ManifestEntry) -> None:
    start, end = utterance.start or 0.0, utterance.end
    if not 0 <= utterance.duration < math.inf:
        raise UserError(f"{path}: '{utterance.id}' has a duration of {utterance.duration} s")
    if not 0 <= start < math.inf or (end is not None and not start < end < math.inf):
        raise UserError(f"{path}: '{utterance.id}' goes from {start} to {end} s")


def _guess(path: Path) -> str:
    if path.is_file():
        return "jsonl"
    if (path / "wav.scp").is_file():
        return "kaldi"
    if next(path.rglob("*.trans.txt"), None) is not None:
        return "librispeech"
    if _aishell_table(path) is not None:
        return "aishell"
    raise UserError(
        f"{path} is no JSONL manifest, Kaldi folder, LibriSpeech or AISHELL-1 tree: say --kind"
    )


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8: {error}") from None
    # Not splitlines: a transcript may hold U+2028 or another of the characters that it cuts at.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield number, line


def _jsonl(path: Path, lang: str, left_out: list[DroppedSample]) -> Iterator[ManifestEntry]:
    known = ("id", "audio", "text", "speaker", "lang", "duration", "start", "end")
    for number, line in _lines(path):
        try:
            row = json.loads(line)
            if not isinstance(row["text"], str) or not isinstance(row["audio"], str):
                raise ValueError("'text' and 'audio' must be strings")
            _check_phonemes(row.get("phonemes"))
            start, end = (None if row.get(k) is None else float(row[k]) for k in ("start", "end"))
            yield ManifestEntry(
                id=str(row["id"]),
                audio=path.parent / row["audio"],
                text=row["text"],
                speaker=str(row.get("speaker") or ""),
                lang=str(row.get("lang") or lang),
                duration=float(row.get("duration") or 0.0),
                start=0.0 if start is None and end is not None else start,
                end=end,
                extra={k: v for k, v in row.items() if k not in known},
            )
        except KeyError as error:
            raise UserError(f"{path}, line {number}: {error} is missing") from None
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"{path}, line {number}: {error}") from None


def _check_phonemes(phonemes: Any) -> None:
    if phonemes is not None and not (
        isinstance(phonemes, list) and all(isinstance(p, str) for p in phonemes)
    ):
        raise ValueError("'phonemes' must be a list of strings")


def _table(path: Path, required: bool = True) -> dict[str, str]:
    """A Kaldi table: first field → the rest of the line."""
    if not path.is_file():
        if required:
            raise UserError(f"{path.parent} is no Kaldi data folder: it lacks {path.name}")
        return {}
    rows: dict[str, str] = {}
    for number, line in _lines(path):
        key, *value = line.split(maxsplit=1)
        if key in rows:
            raise UserError(f"{path}, line {number}: '{key}' a second time")
        rows[key] = value[0].strip() if value else ""
    return rows


def _kaldi(path: Path, lang: str, left_out: list[DroppedSample]) -> Iterator[ManifestEntry]:
    recordings, texts = _table(path / "wav.scp"), _table(path / "text")
    speakers = _table(path / "utt2spk", required=False)
    langs = _table(path / "utt2lang", required=False)
    for name, source in recordings.items():
        if source.endswith("|") or source.startswith("|"):
            raise UserError(
                f"{path / 'wav.scp'}: '{name}' is a command, and commands are never run: "
                "convert the audio to files first"
            )

    def build(key: str, recording: str, start=None, end=None) -> ManifestEntry:
        if recording not in recordings:
            raise UserError(f"{path}: '{key}' names a recording '{recording}' that wav.scp lacks")
        source = Path(recordings[recording])
        audio = source if source.is_absolute() else path / source
        if not audio.is_file() and not source.is_absolute() and source.is_file():
            audio = source
        speaker, language = speakers.get(key, ""), langs.get(key, lang)
        return ManifestEntry(key, audio, texts[key], speaker, language, 0.0, start, end)

    segments = _table(path / "segments", required=False)
    for key in segments or recordings:
        if key not in texts:
            left_out.append(("missing_text", str(path / "text"), key, "no transcript"))
    for key in texts:
        if not segments:
            yield build(key, key)
        elif key in segments:
            try:
                recording, start, end = segments[key].split()[:3]
                until = float(end)
                yield build(key, recording, float(start), until if until >= 0 else None)
            except ValueError:
                raise UserError(f"{path / 'segments'}: bad line for '{key}'") from None
        else:
            raise UserError(f"{path / 'segments'} lacks '{key}'")


def _librispeech(path: Path, lang: str, left_out: list[DroppedSample]) -> Iterator[ManifestEntry]:
    for table in sorted(path.rglob("*.trans.txt")):
        transcribed = set()
        for key, text in _table(table).items():
            transcribed.add(key)
            yield ManifestEntry(key, table.parent / f"{key}.flac", text, key.split("-")[0], lang)
        for audio in sorted(table.parent.glob("*.flac")):
            if audio.stem not in transcribed:
                left_out.append(("missing_text", str(table), audio.stem, "no transcript"))


def _aishell_table(path: Path) -> Path | None:
    """AISHELL-1's only transcript: in the tree, or beside it if ``path`` is a split's folder."""
    name = "aishell_transcript*.txt"
    inside = min(path.rglob(name), default=None)
    above = (
        min(parent.glob(f"transcript/{name}"), default=None)
        for parent in path.absolute().parents[:3]
    )
    return inside or next((table for table in above if table is not None), None)


def _aishell(path: Path, lang: str, left_out: list[DroppedSample]) -> Iterator[ManifestEntry]:
    table = _aishell_table(path)
    if table is None:
        raise UserError(f"{path} has no aishell_transcript*.txt")
    texts = _table(table)
    # The transcript covers all splits, but a tree may have only some: iterate over the audio.
    for audio in sorted(path.rglob("*.wav")):
        key = audio.stem
        if key in texts:
            yield ManifestEntry(key, audio, "".join(texts[key].split()), audio.parent.name, lang)
        else:
            left_out.append(("missing_text", str(table), key, "no transcript"))


def extension(path: Path) -> str:
    """The member extension of an audio file. Raises `UserError` for a format that is not read."""
    suffix = path.suffix.lower().lstrip(".")
    if suffix not in EXTENSIONS:
        raise UserError(f"{path}: audio must be one of {', '.join(EXTENSIONS)}")
    return suffix
