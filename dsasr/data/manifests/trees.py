"""LibriSpeech and AISHELL-1: trees of audio and transcripts, unpacked or as downloaded.

AISHELL-1 comes as one archive with an archive for each speaker in it. The audio of archives is
unpacked into the corpus' scratch folder, under names of its own: a member's name is never used as
a path.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path, PurePosixPath

from dsasr.data.manifests.entry import Corpus, Form, ManifestEntry
from dsasr.data.manifests.kaldi import table
from dsasr.data.shards.tars import is_macos_extra
from dsasr.utils.errors import UserError

ARCHIVES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
_SPLIT = re.compile(r"(train|dev|validation|valid|test)([-._].*)?")  # train-clean-100, dev …
_PEEK = 200  # members of an archive by which it is recognized
_TABLE = "aishell_transcript"
_MEMBERS = {
    "librispeech": re.compile(r"\.trans\.txt$|/\d+-\d+-\d{4}\.flac$"),
    "aishell": re.compile(rf"{_TABLE}|(^|/)wav/S\d{{4}}\.tar\.gz$|/BAC009S\d{{4}}W\d{{4}}\.wav$"),
}

File = tuple[PurePosixPath, Path]  # its name in the tree, and where it lies


def one_split(corpus: Corpus, files: Sequence[File]) -> Sequence[File]:
    """``files``, or those of the corpus' split. Raises `UserError` for, say, a test set beside the
    training data, and for a split that is not there."""
    by_split: dict[str, list[File]] = {}
    for name, path in files:
        splits = [found[1] for part in name.parts if (found := _SPLIT.fullmatch(part))]
        by_split.setdefault(splits[0] if splits else "", []).append((name, path))
    if corpus.every_split:
        return files
    if corpus.split:
        if corpus.split not in by_split:
            known = ", ".join(sorted(filter(None, by_split))) or "no split by name"
            raise UserError(f"{corpus.path} holds {known}, not '{corpus.split}'")
        return by_split[corpus.split]
    known = sorted(filter(None, by_split))
    if len(known) > 1:
        first = by_split[known[0]][0][0]
        parts = [i for i, part in enumerate(first.parts) if _SPLIT.fullmatch(part)]
        folder = corpus.path.joinpath(*first.parts[: parts[0] + 1])
        raise UserError(
            f"{corpus.path} holds {', '.join(known)} data, which must stay apart: pack each "
            f"split's folder alone, such as {folder}, or give --split {known[0]}"
        )
    return files


def split_of(name: PurePosixPath) -> str:
    """The split that a file's path in its corpus names: of a folder its whole name
    (train-clean-100), of a file its first word (train-00000-of-00002.parquet); "": none."""
    for part in name.parts[:-1]:
        if _SPLIT.fullmatch(part):
            return part
    found = _SPLIT.fullmatch(name.name)
    return found[1] if found else ""


def files_of(corpus: Corpus) -> list[File]:
    """All files below a folder or in an archive, by name; archives in it are unpacked."""
    path = corpus.path
    if path.is_file():
        return sorted(_unpacked(corpus, path, PurePosixPath()))
    files, archives, folders = [], [], set()
    for found in sorted(path.rglob("*")):
        name = PurePosixPath(found.relative_to(path))
        if found.is_dir():
            folders.add(found.name)
        elif found.name.endswith(ARCHIVES) and not is_macos_extra(str(name)):
            archives.append((name, found))
        elif not is_macos_extra(str(name)):
            files.append((name, found))
    for name, archive in archives:
        if name.name.partition(".")[0] not in folders:  # or it was unpacked where it lies
            files += _unpacked(corpus, archive, name.parent)
    return sorted(files)


def _unpacked(corpus: Corpus, archive: Path, below: PurePosixPath) -> Iterator[File]:
    """The files of an archive and of the archives in it."""
    folder = corpus.folder_for_audio()
    try:
        with tarfile.open(archive, "r|*") as tar:
            for number, member in enumerate(tar):
                name = below / member.name
                suffix = next((e for e in ARCHIVES if member.name.endswith(e)), name.suffix)
                if not member.isreg() or is_macos_extra(member.name) or not suffix:
                    continue
                target = folder / f"{archive.name.partition('.')[0]}-{number:06d}{suffix}"
                with open(target, "wb") as file:
                    source = tar.extractfile(member)
                    while block := source.read(1 << 20):
                        file.write(block)
                if suffix in ARCHIVES:
                    yield from _unpacked(corpus, target, name.parent)
                    target.unlink()
                else:
                    yield name, target
    except (tarfile.TarError, EOFError, OSError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{archive} cannot be unpacked: {reason}") from None


@lru_cache(maxsize=8)
def _kind_of_archive(path: Path) -> str:
    """The corpus of an archive by its first members, of which no more are unpacked than needed."""
    if not path.is_file() or not path.name.endswith(ARCHIVES):
        return ""
    try:
        with tarfile.open(path, "r|*") as tar:
            for member, _ in zip(tar, range(_PEEK), strict=False):
                for kind, pattern in _MEMBERS.items():
                    if pattern.search(member.name):
                        return kind
    except (tarfile.TarError, EOFError, OSError):
        pass
    return ""


def _librispeech(corpus: Corpus) -> Iterator[ManifestEntry]:
    files = one_split(corpus, files_of(corpus))
    audio = {name: path for name, path in files if name.suffix == ".flac"}
    transcribed = set()
    for name, path in files:
        if not name.name.endswith(".trans.txt"):
            continue
        for key, text in table(path).items():
            member = name.parent / f"{key}.flac"
            transcribed.add(member)
            # One that is not there is named with all other missing audio.
            where = audio.get(member, path.parent / member.name)
            speaker, lang = key.split("-")[0], corpus.lang or "en"
            yield ManifestEntry(key, where, text, speaker, lang, split=split_of(name))
    for name in audio:
        if name not in transcribed:
            corpus.leave_out("missing_text", name.stem, "no transcript")


def _is_librispeech(path: Path) -> bool:
    if path.is_dir():
        return next(path.rglob("*.trans.txt"), None) is not None
    return _kind_of_archive(path) == "librispeech"


def _table_above(path: Path) -> Path | None:
    """AISHELL-1's only transcript where ``path`` is a split's folder."""
    above = (
        min(parent.glob(f"transcript/{_TABLE}*.txt"), default=None)
        for parent in path.absolute().parents[:3]
    )
    return next((found for found in above if found is not None), None)


def _aishell(corpus: Corpus) -> Iterator[ManifestEntry]:
    files = files_of(corpus)
    tables = [path for name, path in files if name.name.startswith(_TABLE)]
    found = tables[0] if tables else _table_above(corpus.path)
    if found is None:
        raise UserError(f"{corpus.path} has no {_TABLE}*.txt")
    texts = table(found)
    # The transcript covers all splits, but a tree may have only some: iterate over the audio.
    for name, path in one_split(corpus, [file for file in files if file[0].suffix == ".wav"]):
        if name.stem in texts:
            text = "".join(texts[name.stem].split())
            speaker, lang = name.parent.name, corpus.lang or "zh"
            yield ManifestEntry(name.stem, path, text, speaker, lang, split=split_of(name))
        else:
            corpus.leave_out("missing_text", name.stem, "no transcript")


def _is_aishell(path: Path) -> bool:
    if path.is_dir():
        inside = next(path.rglob(f"{_TABLE}*.txt"), None)
        return inside is not None or _table_above(path) is not None
    return _kind_of_archive(path) == "aishell"


LIBRISPEECH = Form("librispeech", "LibriSpeech tree", _is_librispeech, _librispeech, True)
AISHELL = Form("aishell", "AISHELL-1 tree", _is_aishell, _aishell, True)
