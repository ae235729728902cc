"""`dsasr init`: from the corpora that a user names to a folder with shards and recipes."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from dsasr import recipe
from dsasr.build import Builder
from dsasr.data.shards.build_index import read_texts
from dsasr.data.shards.sample import Sample
from dsasr.setup import prepare, report
from dsasr.setup.facts import Facts, ReadySet
from dsasr.setup.layouts import Source, find_sources
from dsasr.setup.lengths import Lengths
from dsasr.setup.parts import (
    Device,
    LanguageModel,
    SpeechEncoder,
    look_at_encoder,
    look_at_llm,
)
from dsasr.setup.recipes import Written, clock, main_recipe, try_recipe
from dsasr.setup.scan import Scan, scan
from dsasr.setup.shard_corpus import read_shard_corpus
from dsasr.setup.shard_sets import SHARDS
from dsasr.setup.splits import DataSet, assign_sets, shared
from dsasr.setup.ways import Way, choose_way
from dsasr.training import preflight
from dsasr.utils.errors import UserError
from dsasr.utils.hashing import hash64
from dsasr.utils.io import atomic_write, fsync_dir, fsync_file, replace_folder, staging_folder

NOTE = "init.json"  # what the folder was made of, and what was said
MARK = ".data"  # in a folder that is being made: whose shards it has
VERSION = 1
SHARDS_FOLDER = "shards"


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


@dataclass
class Corpus:
    """The data as it is made ready: in shards, or not yet (``scan``)."""

    sources: list[Source]
    identity: str
    data: list[DataSet]
    sets: list[ReadySet] = field(default_factory=list)
    scan: Scan | None = None
    lines: list[str] = field(default_factory=list)  # what is said of it
    notes: list[str] = field(default_factory=list)


def init(options: Options, say=print) -> None:
    """Make the folder ``options.out``, or say what it would be. Raises `UserError`; the folder is
    there whole or not at all."""
    _check(options)
    sources = find_sources(options.data, options.kind)
    with _workspace(options) as place:
        corpus = _read(sources, options, place)
        if not options.dry_run and (done := _done(options, corpus.identity)):
            for line in done:
                say(line)
            return
        device = Device.here()
        encoder = look_at_encoder(options.encoder, device, fetch=not options.dry_run)
        llm = look_at_llm(options.llm, fetch=not options.dry_run) if options.llm else None
        for line in report.layout(sources):
            say(line)
        if options.dry_run:
            _dry_run(options, corpus, encoder, llm, device, say)
            return
        _keep_shards(options, corpus.identity, place)
        _pack(options, corpus, place)
        lines = list(_found(corpus))
        for line in lines:
            say(line)
        facts = _derive(options, corpus, encoder, place)
        main, way = main_recipe(
            facts, encoder, llm, device, str(options.run_folder), _title(options)
        )
        path = options.out.absolute() / f"{options.name}.yaml"
        short = try_recipe(main, path, facts, device, f"{options.run_folder}-try")
        (place / path.name).write_text(main.text, encoding="utf-8")
        _preflight(main, place, options)
        (place / "try.yaml").write_text(short.text, encoding="utf-8")
        last = [*_expected(way, main, device), *commands(options, facts, main, short)]
        note = {"version": VERSION, "data": corpus.identity, "choices": options.choices,
                "lines": last}  # fmt: skip
        (place / MARK).unlink()
        atomic_write(place / NOTE, json.dumps(note, indent=1, ensure_ascii=False))
    for line in last:
        say(line)


def _check(options: Options) -> None:
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
def _workspace(options: Options) -> Iterator[Path]:
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
    place.mkdir(parents=True, exist_ok=True)
    try:
        yield place
        shutil.rmtree(_scratch(place), ignore_errors=True)
        if (place / NOTE).is_file():
            for path in place.rglob("*"):
                (fsync_dir if path.is_dir() else fsync_file)(path)
            replace_folder(place, out)
    except KeyboardInterrupt:
        shutil.rmtree(_scratch(place), ignore_errors=True)
        raise
    except BaseException:
        shutil.rmtree(place, ignore_errors=True)
        raise
    else:
        shutil.rmtree(place, ignore_errors=True)


def _scratch(place: Path) -> Path:
    return place / ".scratch.tmp"


# -- data ----------------------------------------------------------------------------------------


def _read(sources: list[Source], options: Options, place: Path) -> Corpus:
    if sources[0].form is SHARDS:
        found = read_shard_corpus(sources, options.lang)
        corpus = Corpus(sources, found.identity, found.data, found.sets, notes=found.notes)
        corpus.lines = [*report.texts(found.text)]
        corpus.text, corpus.keys = found.text, found.keys
    else:
        scratch = _scratch(place)
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        read = scan(sources, options.lang, scratch / "utterances", scratch)
        data, notes = assign_sets(read.sets, read.set_N, read.keys)
        rates, _ = prepare.rates(read.entries)
        corpus = Corpus(sources, read.identity, data, scan=read, notes=notes)
        corpus.lines = [*report.texts(read.text), report.audio(rates)]
        corpus.text, corpus.keys = read.text, read.keys
    corpus.notes += shared(corpus.data, corpus.keys)
    if copies := report.copies(corpus.keys):
        corpus.notes.append(copies)
    return corpus


def _done(options: Options, identity: str) -> list[str]:
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


def _keep_shards(options: Options, identity: str, place: Path) -> None:
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


def _pack(options: Options, corpus: Corpus, place: Path) -> None:
    if corpus.scan is None:
        return
    folder, final = place / SHARDS_FOLDER, options.out.absolute() / SHARDS_FOLDER
    if folder.is_dir():  # of an interrupted run with other splits
        for old in folder.iterdir():
            if old.name not in {one.name for one in corpus.data}:
                shutil.rmtree(old, ignore_errors=True)
    corpus.sets, notes = prepare.pack_sets(
        corpus.scan, corpus.data, folder, final, options.processes
    )
    corpus.notes += notes


def _found(corpus: Corpus, about: bool = False) -> Iterator[str]:
    """What is said of the data."""
    yield from report.set_table(corpus.sets, corpus.data, corpus.keys, about)
    yield from corpus.lines
    yield from report.lengths(corpus.sets)
    yield from corpus.notes


def _derive(options: Options, corpus: Corpus, encoder: SpeechEncoder, place: Path) -> Facts:
    """The files that are computed of the training data, as its way to train needs them."""
    final = options.out.absolute()
    kind = prepare.choose_units(corpus.text)
    facts = Facts(tuple(corpus.sets), corpus.text, kind)
    way = choose_way(facts, encoder)
    tars = [tar for one in facts.of_role("train") for tar in one.tars]
    made = {}
    if way in ("read", "scratch"):
        prepare.write_units(tars, kind, place / "units.json")
        made["phonemes"] = str(final / "units.json")
    if way == "scratch":
        prepare.write_cmvn(tars, encoder.bins, place / "cmvn.json")
        made["cmvn"] = str(final / "cmvn.json")
    if way == "read":
        made["sentences"] = str(options.text.absolute()) if options.text else str(
            final / "text.txt"
        )  # fmt: skip
        if options.text is None:
            prepare.write_sentences(_transcripts(facts), place / "text.txt")
    return Facts(tuple(corpus.sets), corpus.text, kind, **made)


def _transcripts(facts: Facts) -> Iterator[str]:
    for one in facts.of_role("train"):
        for tar in one.tars:
            for sample in read_texts(tar, one.fields):
                if isinstance(sample, Sample):
                    yield sample.text


def _preflight(main: Written, place: Path, options: Options) -> None:
    """Check the recipe as training does, with the files where they lie now."""
    final = str(options.out.absolute())
    text = main.text.replace(final + os.sep, str(place) + os.sep)
    path = place / ".check.yaml"
    path.write_text(text, encoding="utf-8")
    try:
        preflight.check(Builder(recipe.load(str(path))))
    finally:
        path.unlink()


# -- words ---------------------------------------------------------------------------------------


def _title(options: Options) -> str:
    data = " ".join(map(str, options.data))
    return f"Made by dsasr init of {' '.join(data.split())}; every key: dsasr/recipes/README.md."


def _expected(way: Way, main: Written, device: Device) -> list[str]:
    times = ", ".join(f"{name} {clock(spent)}" for name, spent in main.seconds.items())
    return [
        "",
        f"recipe: on {way.base}, for {device}",
        *way.expect,
        f"Planned on this machine, by arithmetic: {clock(main.total)} ({times}).",
    ]


def commands(options: Options, facts: Facts, main: Written, short: Written) -> list[str]:
    """The next three commands, with what each is for."""
    out, run = options.out.absolute(), options.run_folder
    test = facts.of_role("test")
    shards = test[0].shards if test else ""
    data = [shards] if isinstance(shards, str) else shards
    named = " ".join(report.shown(Path(shard)) for shard in data)
    return [
        "",
        f"# does all run? {clock(short.total)} and the start; its score means nothing",
        f"dsasr train --recipe {report.shown(out / 'try.yaml')}",
        f"# {clock(main.total)}; watch it with: dsasr watch {report.shown(run)}",
        f"dsasr train --recipe {report.shown(out / f'{options.name}.yaml')}",
        f"dsasr evaluate {report.shown(run)} --data {named} --report",
    ]


def _dry_run(
    options: Options,
    corpus: Corpus,
    encoder: SpeechEncoder,
    llm: LanguageModel | None,
    device: Device,
    say,
) -> None:
    about = corpus.scan is not None
    if corpus.scan is not None:
        corpus.sets = [_unpacked(options, corpus.scan, one) for one in corpus.data]
    for line in _found(corpus, about):
        say(line)
    say("nothing was written (--dry-run)")
    if llm is None:
        return
    final = options.out.absolute()
    facts = Facts(
        tuple(corpus.sets), corpus.text, prepare.choose_units(corpus.text),
        str(final / "units.json"), str(final / "cmvn.json"),
        str(options.text or final / "text.txt"),
    )  # fmt: skip
    main, way = main_recipe(facts, encoder, llm, device, str(options.run_folder), _title(options))
    for line in [*_expected(way, main, device), "", f"{final / options.name}.yaml would be:", "",
                 *main.text.splitlines()]:  # fmt: skip
        say(line)


def _unpacked(options: Options, read: Scan, one: DataSet) -> ReadySet:
    """A set with the lengths that its manifest claims, or those of some of its files."""
    entries = read.entries.select(one.chosen)
    claimed = ((e.duration or (e.end or 0.0) - (e.start or 0.0), len(e.text)) for e in entries)
    rows = np.array(list(claimed), np.float32).reshape(-1, 2)
    seconds = rows[:, 0]
    if not (seconds > 0).all():
        _, looked_at = prepare.rates(entries)
        seconds = np.resize(looked_at if len(looked_at) else np.zeros(1), len(rows))
    lengths = Lengths(seconds.astype(np.float32), rows[:, 1].astype(np.int32))
    shards = str(options.out.absolute() / SHARDS_FOLDER / one.name)
    return ReadySet(one.name, one.role, shards, (), lengths)
