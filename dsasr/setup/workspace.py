"""The folder that `dsasr init` makes: built hidden beside its place, there whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dsasr.utils.errors import UserError
from dsasr.utils.hashing import hash64
from dsasr.utils.io import atomic_write, fsync_tree, replace_folder, staging_folder

NOTE = "init.json"  # what the folder was made of, and what was said
MARK = ".data"  # in a folder that is being made: whose shards it has
VERSION = 1
SHARDS_FOLDER = "shards"  # of the sets


@dataclass(frozen=True)
class Options:
    """As on the command line (`dsasr.cli.init`)."""

    data: tuple[Path, ...]
    llm: str = ""
    encoder: str = ""
    out: Path = Path("mine")
    run: Path | None = None
    lang: str = ""
    kind: str = "auto"
    text: Path | None = None
    dry_run: bool = False
    overwrite: bool = False
    processes: int | None = None

    @property
    def name(self) -> str:
        return self.out.absolute().name

    @property
    def run_folder(self) -> Path:
        return (self.run or Path("runs") / self.name).absolute()

    @property
    def choices(self) -> str:
        """A hash of all that the recipe depends on besides the corpus."""
        values = [self.llm, self.encoder, self.lang, self.kind, str(self.run_folder)]
        values.append(str(self.text and (self.text.absolute(), os.stat(self.text).st_size)))
        return f"{hash64(json.dumps(values)):016x}"


def check(options: Options) -> None:
    """Raise `UserError` for options that no folder can be made with."""
    out = options.out.absolute()
    if "\n" in str(out) or not out.name.isprintable():
        raise UserError(f"--out: {str(options.out)!r} has a line break in its name")
    if not options.llm and not options.dry_run:
        raise UserError(
            "--llm is not given: a folder or a hub name of a causal language model, such as "
            "Qwen/Qwen3-0.6B (--dry-run looks at the data without one)"
        )
    if options.text is not None and not options.text.is_file():
        raise UserError(f"--text: there is no {options.text}")
    if options.dry_run:
        return
    note, parent = out / NOTE, out
    if out.exists() and not note.is_file() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out: {options.out} is there, and not of dsasr init: give another name")
    while not parent.exists():
        parent = parent.parent
    if not os.access(parent, os.W_OK):
        raise UserError(f"--out: {options.out} cannot be written into {parent}: give another place")


@contextlib.contextmanager
def workspace(options: Options) -> Iterator[Path]:
    """The folder that becomes ``options.out`` at the end, if anything was made in it.

    It is removed when an error ends the command. After an interrupt or a kill it stays, hidden,
    and the next run packs only what is missing of the same data.
    """
    if options.dry_run:
        with tempfile.TemporaryDirectory(prefix="dsasr-init-") as name:
            yield Path(name)
        return
    out = options.out.absolute()
    place = staging_folder(out)
    made = [parent for parent in place.parents if not parent.exists()]
    place.mkdir(parents=True, exist_ok=True)
    (place / NOTE).unlink(missing_ok=True)  # of a run that was killed right at its end
    try:
        yield place
        shutil.rmtree(scratch_folder(place), ignore_errors=True)
        if (place / NOTE).is_file():
            fsync_tree(place)
            replace_folder(place, out)
    except KeyboardInterrupt:
        shutil.rmtree(scratch_folder(place), ignore_errors=True)
        raise
    except BaseException:
        shutil.rmtree(place, ignore_errors=True)
        for parent in made:
            with contextlib.suppress(OSError):
                parent.rmdir()
        raise
    else:
        shutil.rmtree(place, ignore_errors=True)


def scratch_folder(place: Path) -> Path:
    return place / ".scratch.tmp"


def already_done(options: Options, identity: str) -> list[str]:
    """What is to be said where the folder is made already; empty: it is to be made."""
    path = options.out.absolute() / NOTE
    try:
        note = json.loads(path.read_text(encoding="utf-8"))
        data, choices, lines = note["data"], note["choices"], note["lines"]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    if options.overwrite:
        return []
    if data != identity:
        raise UserError(
            f"--out: {options.out} was made of other data: --overwrite makes it anew, or give "
            "another folder"
        )
    if choices != options.choices:
        raise UserError(
            f"--out: {options.out} was made with other options: --overwrite writes its recipes "
            "anew and keeps its shards, or give another folder"
        )
    return [f"{options.out} is made already of this data: nothing was done again", *lines]


def keep_shards(options: Options, identity: str, place: Path) -> None:
    """Put shards of the same data into ``place``, and remove those of other data: of a run that
    was interrupted, or of the folder that is made anew."""
    mark = place / MARK
    if mark.is_file() and mark.read_text() == identity:
        return
    shutil.rmtree(place / SHARDS_FOLDER, ignore_errors=True)
    atomic_write(mark, identity)
    old = options.out.absolute()
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        note = json.loads((old / NOTE).read_text(encoding="utf-8"))
        if note["data"] == identity:
            shutil.copytree(old / SHARDS_FOLDER, place / SHARDS_FOLDER, copy_function=_link)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def finish(options: Options, identity: str, place: Path, lines: Sequence[str]) -> None:
    """Note in ``place`` that it is whole, of which data and options, and what was said at the end:
    `workspace` renames it."""
    (place / MARK).unlink()
    note = {"version": VERSION, "data": identity, "choices": options.choices, "lines": [*lines]}
    atomic_write(place / NOTE, json.dumps(note, indent=1, ensure_ascii=False))
