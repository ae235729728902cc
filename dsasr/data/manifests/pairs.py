"""A folder of recordings, each with a text file of the same name beside it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from dsasr.data.audio.files import FFMPEG, SNDFILE
from dsasr.data.manifests.entry import Corpus, Form, ManifestEntry
from dsasr.data.manifests.trees import one_split, split_of
from dsasr.data.shards.tars import is_macos_extra
from dsasr.utils.errors import UserError

_TEXTS = (".txt", ".lab")
_PEEK = 20  # recordings by which a folder is recognized


def is_audio(name: str) -> bool:
    """Whether a file is a recording, by its name."""
    kind = os.path.splitext(name)[1].lower().lstrip(".")
    return kind in (*SNDFILE, *FFMPEG) and not is_macos_extra(name)


def _recordings(folder: Path) -> Iterator[tuple[Path, Path | None]]:
    """All recordings below ``folder``, each with its text file, in order."""
    for parent, folders, names in os.walk(folder):
        folders.sort()
        there = set(names)
        for name in sorted(filter(is_audio, names)):
            stem = os.path.splitext(name)[0]
            text = next((stem + e for e in _TEXTS if stem + e in there), None)
            yield Path(parent, name), None if text is None else Path(parent, text)


def _read(corpus: Corpus) -> Iterator[ManifestEntry]:
    # All of a corpus with splits by name is of one of them, so the names are looked at first.
    if not corpus.every_split:
        audios = [audio for audio, _ in _recordings(corpus.path)]
        named = [(PurePosixPath(audio.relative_to(corpus.path)), audio) for audio in audios]
        wanted = {path for _, path in one_split(corpus, named)}
    for audio, text_file in _recordings(corpus.path):
        name = PurePosixPath(audio.relative_to(corpus.path))
        if not corpus.every_split and audio not in wanted:
            continue
        try:
            text = text_file.read_text(encoding="utf-8-sig").strip() if text_file else ""
        except UnicodeDecodeError as error:
            raise UserError(f"{text_file} is not UTF-8: {error}") from None
        except OSError as error:
            raise UserError(f"{text_file} cannot be read: {error.strerror}") from None
        if not text:
            corpus.leave_out("missing_text", str(name), "no text file of its name, or an empty one")
            continue
        yield ManifestEntry("", audio, text, lang=corpus.lang, split=split_of(name))


def _is_pairs(path: Path) -> bool:
    if not path.is_dir():
        return False
    first = [text for (_, text), _ in zip(_recordings(path), range(_PEEK), strict=False)]
    return 2 * sum(text is not None for text in first) > len(first)


PAIRS = Form("pairs", "folder of recordings, each with a .txt of its name", _is_pairs, _read, True)
