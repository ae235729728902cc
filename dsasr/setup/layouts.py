"""Where the sets of a corpus lie: manifests, trees and shards at the paths that a user gives."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dsasr.data.manifests import jsonl, tables
from dsasr.data.manifests.entry import Form
from dsasr.data.manifests.pairs import is_audio
from dsasr.data.manifests.registry import FORMS, KINDS
from dsasr.data.manifests.rows import first_row
from dsasr.data.manifests.trees import ARCHIVES
from dsasr.setup.shard_sets import SHARDS, is_shards
from dsasr.utils.errors import UserError

# Words of a name that say which split it is of → the role of that split in training.
ROLES = {
    "train": "train", "training": "train",
    "valid": "valid", "validation": "valid", "val": "valid", "dev": "valid",
    "development": "valid",
    "test": "test", "eval": "test",
}  # fmt: skip
_MANIFESTS = (".jsonl", ".json", ".list", ".jsonl.gz", ".tsv", ".txt", ".parquet", *ARCHIVES)
_LOOKED_AT = 100_000  # files of a folder that is not recognized, counted for the message
_SHOWN = 4  # names in a message
COMMON_VOICE_SPLITS = ("train.tsv", "dev.tsv", "test.tsv")


@dataclass(frozen=True)
class Source:
    """A corpus or a part of one. ``split``: what its name calls it (dev-clean), "": nothing."""

    path: Path
    form: Form
    split: str = ""


def role_of(split: str) -> str:
    """train, valid or test, by the first word of ``split`` that is one; "": none is.

    train-clean-100 → train, cuts_dev.jsonl → valid.
    """
    words = re.split(r"[-_. ]+", split.lower())
    return next((ROLES[word] for word in words if word in ROLES), "")


def split_name(path: Path) -> str:
    """``path``'s name without endings, as a data set can be called, if it says a split; else ""."""
    name = path.name
    while path.is_file() and (ending := next((e for e in _MANIFESTS if name.endswith(e)), "")):
        name = name.removesuffix(ending)
    return re.sub(r"[^\w.+-]+", "-", name).strip("-.")[:64] if role_of(name) else ""


def find_sources(paths: Sequence[Path], kind: str = "auto") -> list[Source]:
    """The parts of the corpora at ``paths``, of the form ``kind`` or as recognized.

    A folder may hold one layout: a corpus of a known form, or manifests, folders or shards of one
    form, each a split by its name. Raises `UserError`, in one line, for a folder of two layouts or
    of none.
    """
    sources: list[Source] = []
    for path in paths:
        sources += _sources_at(path, kind)
    places = [source.path.resolve() for source in sources]
    for place in places:
        if places.count(place) > 1:
            raise UserError(f"{place} is named twice")
    shards = [source for source in sources if source.form is SHARDS]
    if shards and len(shards) < len(sources):
        raise UserError(
            f"{shards[0].path} holds shards, which are trained on as they are, the others are to "
            "be packed: give one kind at a time"
        )
    return sources


def _sources_at(path: Path, kind: str) -> list[Source]:
    if not path.exists():
        raise UserError(f"there is no {path}")
    split = split_name(path)
    if kind != "auto":
        if kind not in KINDS:
            raise UserError(f"unknown kind of corpus '{kind}': use {', '.join(KINDS)}")
        return [Source(path, FORMS[KINDS.index(kind)], split)]
    try:
        forms = _forms_of(path)
        if len(forms) > 1:
            names = " and ".join(f"a {form.title} (--kind {form.name})" for form in forms[:_SHOWN])
            raise UserError(f"{path} is {names}: say which with --kind")
        if forms == [tables.COMMON_VOICE_FOLDER]:
            return _common_voice(path)
        if forms:
            return [Source(path, forms[0], split)]
        found = _children(path) if path.is_dir() else []
    except OSError as error:
        raise UserError(f"{error.filename or path} cannot be read: {error.strerror}") from None
    if not found:
        raise UserError(_unknown(path))
    return found


def _forms_of(path: Path) -> list[Form]:
    """The forms that ``path`` is in: of a file at most one."""
    if path.is_file():
        if path.suffix == ".tar" and is_shards(path):
            return [SHARDS]
        if jsonl.SHARD_LIST.recognizes(path):
            return [SHARDS]
        return [form for form in FORMS if form.recognizes(path)][:1]
    forms = [form for form in FORMS if form.recognizes(path)]
    # Files of audio and text lie in trees and beside tables, too.
    forms = [form for form in forms if form.name != "pairs"] or forms
    if not forms and is_shards(path):
        return [SHARDS]
    return forms


def _common_voice(folder: Path) -> list[Source]:
    """Common Voice's own splits. validated.tsv has them all, so it counts where they are missing;
    the other tables are of clips that are in no split."""
    form = tables.COMMON_VOICE
    splits = [folder / name for name in COMMON_VOICE_SPLITS if (folder / name).is_file()]
    if any(path.name == "train.tsv" for path in splits):
        return [Source(path, form, path.stem) for path in splits]
    whole = folder / "validated.tsv"
    if whole.is_file():
        return [Source(whole, form)]
    names = ", ".join(sorted(p.name for p in folder.glob("*.tsv"))[:_SHOWN])
    raise UserError(
        f"{folder} is Common Voice without train.tsv or validated.tsv: name the tables to read "
        f"({names})"
    )


def _children(folder: Path) -> list[Source]:
    """The manifests, corpora and shards right in ``folder``, all of one form."""
    found = []
    for child in sorted(folder.iterdir()):
        if child.name.startswith("."):
            continue
        if child.is_file() and not _may_be_manifest(child):
            continue
        forms = _forms_of(child)
        if forms == [tables.COMMON_VOICE_FOLDER]:
            found += _common_voice(child)
        elif forms:
            found.append(Source(child, forms[0], split_name(child)))
    forms = list(dict.fromkeys(source.form.title for source in found))
    if len(forms) > 1:
        first = {source.form.title: source for source in reversed(found)}
        names = " and ".join(f"{first[t].path.name} ({t})" for t in forms[:_SHOWN])
        raise UserError(f"{folder} holds two layouts, {names}: give the one to read by its path")
    if len(found) > 1 and (nameless := [s.path.name for s in found if not s.split]):
        names = ", ".join(nameless[:_SHOWN])
        raise UserError(
            f"{folder} holds {names} beside {len(found) - len(nameless)} splits by name, and no "
            "name says what it is for: give the paths to train on, and those of valid and test"
        )
    return found


def _may_be_manifest(path: Path) -> bool:
    if path.suffix == ".tar":
        return True
    if not path.name.endswith(_MANIFESTS):
        return False
    # Any .json could be a manifest of this project's; in a folder it has to look like one.
    row = first_row(path)
    is_json = path.name.endswith((".json", ".jsonl", ".jsonl.gz"))
    others = (form for form in FORMS if form is not jsonl.OWN)
    return not is_json or {"audio", "text"} <= row.keys() or any(f.recognizes(path) for f in others)


def _unknown(path: Path) -> str:
    """Why ``path`` is no corpus, in a line."""
    titles = ", ".join(form.title for form in (*FORMS, SHARDS))
    readable = f"what is read: {titles}"
    if path.is_file():
        return f"{path} is no corpus of a form that is known; {readable}"
    audio = others = 0
    example = ""
    for parent, _, names in os.walk(path):
        for name in names:
            audio += is_audio(name)
            others += not is_audio(name)
            example = example or (os.path.join(parent, name) if is_audio(name) else "")
        if audio + others > _LOOKED_AT:
            break
    if not audio + others:
        return f"{path} is empty: give the folder or the manifest of a corpus"
    if not audio:
        return (
            f"{path} holds text or other files ({others:,}), but no audio and no manifest; "
            f"{readable}"
        )
    row = {"id": "1", "audio": os.path.relpath(example, path), "text": "…", "speaker": "…"}
    return (
        f"{path} holds {audio:,} recordings without transcripts: put a .txt of the same name "
        f"beside each, or write train.jsonl with a line {json.dumps(row, ensure_ascii=False)} for "
        "each"
    )
