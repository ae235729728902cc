"""What people have on disk → utterances to pack: JSONL, Kaldi folders, LibriSpeech and AISHELL-1 trees."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import soundfile

from dsasr.data.shards import EXTENSIONS
from dsasr.errors import UserError


@dataclass(frozen=True)
class Utterance:
    """One utterance before packing. ``start`` and ``end`` (s) cut it out of a longer recording."""

    id: str
    audio: Path
    text: str
    speaker: str = ""
    lang: str = ""
    duration: float = 0.0  # 0: read from the audio's header
    start: float | None = None
    end: float | None = None
    extra: dict[str, Any] = field(default_factory=dict)


def read_manifest(path: str | Path, kind: str = "auto", lang: str = "") -> list[Utterance]:
    """The utterances of ``path``: ``kind`` is jsonl, kaldi, librispeech, aishell or auto.

    ``lang`` is given to those that name no language. Raises `UserError` for anything that is not
    what it claims, for a repeated id, and for audio that is not there.
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
    found = list(readers[kind](path, lang or defaults.get(kind, "")))
    if not found:
        raise UserError(f"{path} holds no utterance")
    ids: set[str] = set()
    for utterance in found:
        if utterance.id in ids:
            raise UserError(f"{path} has two utterances with the id '{utterance.id}'")
        ids.add(utterance.id)
    missing = [u for u in found if not u.audio.is_file()]
    if missing:
        raise UserError(
            f"{path}: {len(missing)} of {len(found)} audio files are missing, "
            f"the first is {missing[0].audio}"
        )
    return found


def _guess(path: Path) -> str:
    if path.is_file():
        return "jsonl"
    if (path / "wav.scp").is_file():
        return "kaldi"
    if next(path.rglob("*.trans.txt"), None) is not None:
        return "librispeech"
    if next(path.rglob("aishell_transcript*.txt"), None) is not None:
        return "aishell"
    raise UserError(
        f"{path} is no JSONL manifest, Kaldi folder, LibriSpeech or AISHELL-1 tree: say --kind"
    )


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8: {error}") from None
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            yield number, line


def _jsonl(path: Path, lang: str) -> Iterator[Utterance]:
    known = ("id", "audio", "text", "speaker", "lang", "duration", "start", "end")
    for number, line in _lines(path):
        try:
            row = json.loads(line)
            audio = path.parent / str(row["audio"])
            yield Utterance(
                id=str(row["id"]),
                audio=audio,
                text=str(row["text"]),
                speaker=str(row.get("speaker", "")),
                lang=str(row.get("lang", "") or lang),
                duration=float(row.get("duration", 0.0)),
                start=row.get("start"),
                end=row.get("end"),
                extra={k: v for k, v in row.items() if k not in known},
            )
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"{path}, line {number}: {type(error).__name__} {error}") from None


def _table(path: Path, required: bool = True) -> dict[str, str]:
    """A Kaldi table: first field → the rest of the line."""
    if not path.is_file():
        if required:
            raise UserError(f"{path.parent} is no Kaldi data folder: it lacks {path.name}")
        return {}
    rows = {}
    for _, line in _lines(path):
        key, _, value = line.strip().partition(" ")
        rows[key] = value.strip()
    return rows


def _kaldi(path: Path, lang: str) -> Iterator[Utterance]:
    recordings, texts = _table(path / "wav.scp"), _table(path / "text")
    speakers = _table(path / "utt2spk", required=False)
    langs = _table(path / "utt2lang", required=False)
    for name, source in recordings.items():
        if source.endswith("|"):
            raise UserError(
                f"{path / 'wav.scp'}: '{name}' is a command, and commands are never run: "
                "convert the audio to files first"
            )

    def make(key: str, recording: str, start=None, end=None) -> Utterance:
        if recording not in recordings:
            raise UserError(f"{path}: '{key}' names a recording '{recording}' that wav.scp lacks")
        source = Path(recordings[recording])
        audio = source if source.is_absolute() else path / source
        if not audio.is_file() and not source.is_absolute() and source.is_file():
            audio = source
        speaker, language = speakers.get(key, ""), langs.get(key, lang)
        return Utterance(key, audio, texts[key], speaker, language, 0.0, start, end)

    segments = _table(path / "segments", required=False)
    for key in texts:
        if not segments:
            yield make(key, key)
        elif key in segments:
            try:
                recording, start, end = segments[key].split()
                yield make(key, recording, float(start), float(end))
            except ValueError:
                raise UserError(f"{path / 'segments'}: bad line for '{key}'") from None
        else:
            raise UserError(f"{path / 'segments'} lacks '{key}'")


def _librispeech(path: Path, lang: str) -> Iterator[Utterance]:
    for table in sorted(path.rglob("*.trans.txt")):
        for _, line in _lines(table):
            key, _, text = line.strip().partition(" ")
            yield Utterance(key, table.parent / f"{key}.flac", text, key.split("-")[0], lang)


def _aishell(path: Path, lang: str) -> Iterator[Utterance]:
    table = next(iter(sorted(path.rglob("aishell_transcript*.txt"))), None)
    if table is None:
        raise UserError(f"{path} has no aishell_transcript*.txt")
    audio = {p.stem: p for p in sorted(path.rglob("*.wav"))}
    for _, line in _lines(table):
        key, _, text = line.strip().partition(" ")
        # The transcript covers all splits; a tree may hold only one of them.
        if key in audio:
            yield Utterance(key, audio[key], text.replace(" ", ""), audio[key].parent.name, lang)


def header_seconds(path: Path) -> float:
    """Duration by the audio's header. Raises `soundfile.LibsndfileError`."""
    info = soundfile.info(str(path))
    return info.frames / info.samplerate


def extension(path: Path) -> str:
    """The member extension of an audio file. Raises `UserError` for a format that is not read."""
    found = path.suffix.lower().lstrip(".")
    if found not in EXTENSIONS:
        raise UserError(f"{path}: audio must be one of {', '.join(EXTENSIONS)}")
    return found
