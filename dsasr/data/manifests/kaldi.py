"""Kaldi's data folders: wav.scp and text, and if they are there segments, utt2spk and utt2lang."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from dsasr.data.manifests.entry import Corpus, Form, ManifestEntry
from dsasr.data.manifests.rows import lines
from dsasr.utils.errors import UserError


def table(path: Path, required: bool = True) -> dict[str, str]:
    """A Kaldi table: first field → the rest of the line."""
    if not path.is_file():
        if required:
            raise UserError(f"{path.parent} is no Kaldi data folder: it lacks {path.name}")
        return {}
    rows: dict[str, str] = {}
    for number, line in lines(path):
        key, *value = line.split(maxsplit=1)
        if key in rows:
            raise UserError(f"{path}, line {number}: '{key}' a second time")
        rows[key] = value[0].strip() if value else ""
    return rows


def _kaldi(corpus: Corpus) -> Iterator[ManifestEntry]:
    path, lang = corpus.path, corpus.lang
    recordings, texts = table(path / "wav.scp"), table(path / "text")
    speakers = table(path / "utt2spk", required=False)
    langs = table(path / "utt2lang", required=False)
    for name, source in recordings.items():
        if source.endswith("|") or source.startswith("|"):
            raise UserError(
                f"{path / 'wav.scp'}: '{name}' is a command, and commands are never run: "
                "convert the audio to files first"
            )

        if ".ark:" in source:
            raise UserError(
                f"{path / 'wav.scp'}: '{name}' is in a Kaldi archive: write files with "
                "wav-copy first"
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

    segments = table(path / "segments", required=False)
    for key in segments or recordings:
        if key not in texts:
            corpus.left_out.append(("missing_text", str(path / "text"), key, "no transcript"))
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


KALDI = Form("kaldi", "Kaldi folder", lambda path: (path / "wav.scp").is_file(), _kaldi)
