"""Tables beside a folder of audio: Common Voice, and the audio folders of Hugging Face."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from dsasr.data.manifests.entry import Corpus, Form, ManifestEntry
from dsasr.data.manifests.rows import (
    LANG_NAMES,
    SPEAKER_NAMES,
    TEXT_NAMES,
    audio_of,
    delimited,
    first_of,
    first_row,
    header,
    json_rows,
)
from dsasr.data.manifests.trees import one_split, split_of
from dsasr.utils.errors import UserError


def _common_voice(corpus: Corpus) -> Iterator[ManifestEntry]:
    clips = corpus.path.parent / "clips"
    for row in delimited(corpus.path, tabs=True):
        name, text = row.get("path") or "", row.get("sentence") or ""
        if not name or not text.strip():
            corpus.leave_out("missing_text", name, "no sentence")
            continue
        # Some releases leave out the ending.
        audio = clips / (name if PurePosixPath(name).suffix else f"{name}.mp3")
        speaker, lang = first_of(row, SPEAKER_NAMES), row.get("locale") or corpus.lang
        yield ManifestEntry(PurePosixPath(name).stem, audio, text, speaker, lang)


def _is_common_voice(path: Path) -> bool:
    if path.suffix != ".tsv":
        return False
    return {"path", "sentence"} <= set(header(path, tabs=True))


def _is_common_voice_folder(path: Path) -> bool:
    return (path / "clips").is_dir() and any(map(_is_common_voice, path.glob("*.tsv")))


def _refuse_folder(corpus: Corpus) -> Iterator[ManifestEntry]:
    names = sorted(p.name for p in corpus.path.glob("*.tsv") if _is_common_voice(p))
    raise UserError(f"{corpus.path} is Common Voice: name one of its tables: {', '.join(names)}")
    yield


def _metadata_files(path: Path) -> list[Path]:
    """The metadata.csv and metadata.jsonl of an audio folder, or of its splits."""
    if path.is_file():
        return [path] if path.name in ("metadata.csv", "metadata.jsonl") else []
    names = ("metadata.csv", "metadata.jsonl")
    found = [p for name in names for level in ("", "*/") for p in path.glob(f"{level}{name}")]
    return sorted(found)


def _is_audio_folder(path: Path) -> bool:
    files = _metadata_files(path)
    return bool(files) and "file_name" in (
        first_row(files[0]) if files[0].suffix == ".jsonl" else header(files[0], tabs=False)
    )


def _audio_folder(corpus: Corpus) -> Iterator[ManifestEntry]:
    files = _metadata_files(corpus.path)
    root = corpus.path if corpus.path.is_dir() else corpus.path.parent
    for file, _ in one_split(corpus, [(PurePosixPath(f.relative_to(root)), f) for f in files]):
        table, split = root / file, split_of(file)

        def read(
            row: dict, folder: Path = table.parent, split: str = split
        ) -> ManifestEntry | None:
            name, text = row["file_name"], first_of(row, TEXT_NAMES)
            if not text.strip():
                detail = f"none of the columns {', '.join(TEXT_NAMES)} has a text"
                corpus.leave_out("missing_text", str(name), detail)
                return None
            return ManifestEntry(
                id=str(row.get("id") or ""),
                audio=audio_of(name, folder),
                text=text,
                speaker=first_of(row, SPEAKER_NAMES),
                lang=first_of(row, LANG_NAMES) or corpus.lang,
                split=split,
            )

        if table.suffix == ".jsonl":
            yield from filter(None, json_rows(table, read))
            continue
        try:
            yield from filter(None, map(read, delimited(table, tabs=False)))
        except (KeyError, ValueError) as error:
            raise UserError(f"{table}: {error}") from None


COMMON_VOICE = Form("common-voice", "Common Voice table", _is_common_voice, _common_voice)
COMMON_VOICE_FOLDER = Form(
    "common-voice-folder", "Common Voice folder", _is_common_voice_folder, _refuse_folder
)
AUDIO_FOLDER = Form(
    "audiofolder", "audio folder with metadata.csv or .jsonl", _is_audio_folder, _audio_folder, True
)
