"""All forms of corpora that are read, how one is recognized, and the reader of any."""

from __future__ import annotations

import glob
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from dsasr.data.manifests import jsonl, kaldi, lhotse, pairs, parquet, tables, trees
from dsasr.data.manifests.entry import Corpus, Form, Manifest, ManifestEntry
from dsasr.utils.errors import UserError
from dsasr.utils.hashing import hash64
from dsasr.utils.progress import Bar

# In the order in which they are tried: a JSONL manifest is what no other form claims.
FORMS: tuple[Form, ...] = (
    kaldi.KALDI,
    lhotse.SHAR,
    lhotse.CUTS,
    lhotse.PARTS,
    tables.AUDIO_FOLDER,
    tables.COMMON_VOICE,
    tables.COMMON_VOICE_FOLDER,
    parquet.PARQUET,
    trees.LIBRISPEECH,
    trees.AISHELL,
    pairs.PAIRS,
    jsonl.NEMO,
    jsonl.FUNASR,
    jsonl.SWIFT,
    jsonl.WENET,
    jsonl.SHARD_LIST,
    jsonl.OWN,
)
KINDS = tuple(form.name for form in FORMS)


def recognize(path: str | Path) -> Form:
    """The form of the corpus at ``path``. Raises `UserError` for one that is not known."""
    path = Path(path)
    for form in FORMS:
        if form.recognizes(path):
            return form
    titles = ", ".join(form.title for form in FORMS)
    raise UserError(f"{path} is no corpus of a form that is read ({titles}): say --kind")


def read_manifest(
    path: str | Path,
    kind: str = "auto",
    lang: str = "",
    split: str = "",
    scratch: Path | None = None,
) -> Manifest:
    """The utterances of ``path``, whose form is ``kind`` (one of `KINDS`), or recognized: auto.

    The rest as in `Corpus`. Utterances without audio or a transcript of their own are left out and
    named. Raises `UserError` for a malformed corpus, for one with more than one of training,
    development and test data, for a repeated id, and for missing audio.
    """
    path = Path(path)
    if not path.exists() and not glob.glob(str(path)):
        raise UserError(f"there is no {path}")
    if kind == "auto":
        form = recognize(path)
    elif kind in KINDS:
        form = FORMS[KINDS.index(kind)]
    else:
        raise UserError(f"unknown manifest kind '{kind}': use {', '.join(KINDS)}")
    if split and not form.splits:
        raise UserError(f"--split {split}: a {form.title} is one set; name the one of that split")
    corpus = Corpus(path, lang, split, scratch)
    utterances = list(read_entries(form, corpus))
    if not utterances:
        why = f", only {len(corpus.left_out)} without one" if corpus.left_out else ""
        raise UserError(f"{path} holds no utterance with a transcript{why}")
    ids: set[str] = set()
    missing = []
    for utterance in Bar(utterances, desc="checking audio", unit="file", delay=3):
        if utterance.id in ids:
            raise UserError(f"{path} has two utterances with the id '{utterance.id}'")
        ids.add(utterance.id)
        if not utterance.audio.is_file():
            missing.append(utterance.audio)
    if missing:
        raise UserError(
            f"{path}: {len(missing)} of {len(utterances)} audio files are missing, "
            f"the first is {missing[0]}"
        )
    return Manifest(utterances, tuple(corpus.left_out))


def read_entries(form: Form, corpus: Corpus) -> Iterator[ManifestEntry]:
    """The utterances of ``corpus`` one by one, each with an id and possible times.

    Utterances without an id get one of their file's name, and where they start in it. Raises
    `UserError` as ``form.read`` does, and for impossible times. Whether ids repeat and whether the
    audio is there is the caller's to check.
    """
    taken: set[int] = set()  # hashes, as ids may be millions
    for entry in form.read(corpus):
        if not entry.id:
            part = "" if entry.start is None else f"-{round(1000 * entry.start):07d}"
            name = f"{_printable(entry.audio.stem)}{part}"
            if hash64(name) in taken:
                name = f"{_printable(entry.audio.parent.name)}-{name}"
            number, unique = 2, name
            while hash64(unique) in taken:
                unique, number = f"{name}-{number}", number + 1
            entry = replace(entry, id=unique)
            taken.add(hash64(unique))
        _check_times(corpus.path, entry)
        yield entry


def _printable(name: str) -> str:
    """A file's name as an id can have it."""
    return name if name.isprintable() else "".join(c if c.isprintable() else "_" for c in name)


def _check_times(path: Path, utterance: ManifestEntry) -> None:
    start, end = utterance.start or 0.0, utterance.end
    if not 0 <= utterance.duration < math.inf:
        raise UserError(f"{path}: '{utterance.id}' has a duration of {utterance.duration} s")
    if not 0 <= start < math.inf or (end is not None and not start < end < math.inf):
        raise UserError(f"{path}: '{utterance.id}' goes from {start} to {end} s")
