"""JSON lines: this project's own (id, audio, text …), NeMo's, FunASR's, ms-swift's and WeNet's."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dsasr.data.manifests.entry import Corpus, Form, ManifestEntry
from dsasr.data.manifests.rows import (
    LANG_NAMES,
    SPEAKER_NAMES,
    audio_of,
    first_of,
    first_row,
    json_rows,
    lines,
    seconds,
    text_of,
)
from dsasr.utils.errors import UserError

_OWN = ("id", "audio", "text", "speaker", "lang", "duration", "start", "end", "offset")
_TAG = re.compile(r"<\|([a-z]{2,3})\|>")  # of a language, as FunASR writes it


def _check_phonemes(phonemes: Any) -> None:
    if phonemes is not None and not (
        isinstance(phonemes, list) and all(isinstance(p, str) for p in phonemes)
    ):
        raise ValueError("'phonemes' must be a list of strings")


def _own(corpus: Corpus) -> Iterator[ManifestEntry]:
    def read(row: dict) -> ManifestEntry:
        _check_phonemes(row.get("phonemes"))
        start, end = (None if row.get(k) is None else float(row[k]) for k in ("start", "end"))
        if row.get("offset") is not None:
            if (start, end) != (None, None):
                raise ValueError("'offset' and 'start' or 'end': give one of the two forms")
            start, end = _part(row["offset"], row.get("duration"))
        return ManifestEntry(
            id=str(row["id"]),
            audio=audio_of(row["audio"], corpus.path.parent),
            text=text_of(row["text"]),
            speaker=str(row.get("speaker") or ""),
            lang=str(row.get("lang") or corpus.lang),
            duration=float(row.get("duration") or 0.0),
            start=0.0 if start is None and end is not None else start,
            end=end,
            extra={k: v for k, v in row.items() if k not in _OWN},
        )

    yield from json_rows(corpus.path, read)


def _part(offset: Any, duration: Any) -> tuple[float, float | None]:
    """Start and end of ``duration`` seconds from ``offset`` on."""
    start = seconds(offset)
    return start, start + seconds(duration) if duration else None


def _nemo(corpus: Corpus) -> Iterator[ManifestEntry]:
    def read(row: dict) -> ManifestEntry | None:
        audio, text = audio_of(row["audio_filepath"], corpus.path.parent), row.get("text")
        if not isinstance(text, str):
            corpus.leave_out("missing_text", audio.name, "no transcript")
            return None
        start, end = None, None
        if row.get("offset") is not None:
            start, end = _part(row["offset"], row.get("duration"))
        return ManifestEntry(
            id=str(row.get("id") or ""),
            audio=audio,
            text=text,
            speaker=first_of(row, SPEAKER_NAMES),
            lang=first_of(row, (*LANG_NAMES, "target_lang", "source_lang")) or corpus.lang,
            duration=seconds(row.get("duration")),
            start=start,
            end=end,
        )

    yield from filter(None, json_rows(corpus.path, read))


def _funasr(corpus: Corpus) -> Iterator[ManifestEntry]:
    def read(row: dict) -> ManifestEntry:
        tag = _TAG.search(str(row.get("text_language") or ""))
        return ManifestEntry(
            id=str(row.get("key") or ""),
            audio=audio_of(row["source"], corpus.path.parent),
            text=text_of(row["target"]),
            lang=tag[1] if tag else first_of(row, LANG_NAMES) or corpus.lang,
        )

    yield from json_rows(corpus.path, read)


def _swift(corpus: Corpus) -> Iterator[ManifestEntry]:
    def read(row: dict) -> ManifestEntry | None:
        replies = [m["content"] for m in row["messages"] if m.get("role") == "assistant"]
        audios = [a["path"] if isinstance(a, dict) else a for a in row["audios"]]
        if len(audios) != 1 or not replies:
            detail = f"{len(audios)} audio files, {len(replies)} replies; one of each is an ASR row"
            corpus.leave_out("not_asr", str(row.get("id") or audios[:1]), detail)
            return None
        content = replies[-1]
        if isinstance(content, list):
            content = " ".join(part["text"] for part in content if part.get("type") == "text")
        return ManifestEntry(
            id=str(row.get("id") or ""),
            audio=audio_of(audios[0], corpus.path.parent),
            text=text_of(content),
            lang=first_of(row, LANG_NAMES) or corpus.lang,
        )

    yield from filter(None, json_rows(corpus.path, read))


def _wenet(corpus: Corpus) -> Iterator[ManifestEntry]:
    def read(row: dict) -> ManifestEntry:
        start, end = (None if row.get(k) is None else float(row[k]) for k in ("start", "end"))
        return ManifestEntry(
            id=str(row.get("key") or ""),
            audio=audio_of(row["wav"], corpus.path.parent),
            text=text_of(row["txt"]),
            speaker=first_of(row, SPEAKER_NAMES),
            lang=first_of(row, LANG_NAMES) or corpus.lang,
            start=0.0 if start is None and end is not None else start,
            end=end,
        )

    yield from json_rows(corpus.path, read)


def _lists_shards(path: Path) -> bool:
    """Whether ``path`` is WeNet's list of shards: a tar's path on each line."""
    if not path.is_file() or path.suffix not in (".list", ".txt", ".scp"):
        return False
    try:
        with open(path, encoding="utf-8") as file:
            return file.readline(4096).strip().endswith((".tar", ".tar.gz"))
    except (OSError, UnicodeDecodeError):
        return False


def _refuse_shards(corpus: Corpus) -> Iterator[ManifestEntry]:
    first = next(lines(corpus.path))[1].strip()
    raise UserError(
        f"{corpus.path} lists shards, which need no packing: index them with `dsasr data index "
        f"{first} … --fields text=.txt` and name them in the recipe"
    )
    yield  # a reader is a generator


def _is_own(path: Path) -> bool:
    return path.is_file() and (
        path.suffix in (".jsonl", ".json") or {"audio", "text"} <= first_row(path).keys()
    )


def _has(*keys: str):
    return lambda path: set(keys) <= first_row(path).keys()


NEMO = Form("nemo", "NeMo manifest", _has("audio_filepath"), _nemo)
FUNASR = Form("funasr", "FunASR or SLAM-LLM list", _has("source", "target"), _funasr)
SWIFT = Form("swift", "ms-swift dataset", _has("messages", "audios"), _swift)
WENET = Form("wenet", "WeNet list", _has("wav", "txt"), _wenet)
SHARD_LIST = Form("wenet-shards", "WeNet list of shards", _lists_shards, _refuse_shards)
OWN = Form("jsonl", "JSONL manifest", _is_own, _own)
