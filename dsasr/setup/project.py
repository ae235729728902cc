"""`dsasr init`: from the corpora that a user names to a folder with shards and recipes."""

from __future__ import annotations

import glob
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dsasr import config
from dsasr.build import Builder
from dsasr.data.shards.build_index import read_texts
from dsasr.data.shards.sample import Sample
from dsasr.recipe import Recipe
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
from dsasr.setup.scan import Scan, UtteranceKeys, scan
from dsasr.setup.shard_corpus import read_shard_corpus
from dsasr.setup.shard_sets import SHARDS
from dsasr.setup.splits import DataSet, assign_sets, shared
from dsasr.setup.text_survey import TextSurvey
from dsasr.setup.ways import Way, choose_way
from dsasr.setup.workspace import (
    SHARDS_FOLDER,
    Options,
    already_done,
    check,
    finish,
    keep_shards,
    scratch_folder,
    workspace,
)
from dsasr.training import preflight


@dataclass
class Corpus:
    """The data as it is made ready: in shards, or not yet (``scan``)."""

    sources: list[Source]
    identity: str
    data: list[DataSet]
    text: TextSurvey
    keys: UtteranceKeys
    sets: list[ReadySet] = field(default_factory=list)
    scan: Scan | None = None
    lines: list[str] = field(default_factory=list)  # what is said of it
    notes: list[str] = field(default_factory=list)


def init(options: Options, say=print) -> None:
    """Make the folder ``options.out``, or say what it would be. Raises `UserError`; the folder is
    there whole or not at all."""
    check(options)
    sources = find_sources(options.data, options.kind)
    with workspace(options) as place:
        corpus = _read(sources, options, place)
        if not options.dry_run and (lines := already_done(options, corpus.identity)):
            for line in lines:
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
        run, title = str(options.run_folder), _title(options)
        # Packing takes minutes: a missing library or too little memory shows before it.
        main_recipe(_facts_ahead(options, corpus), encoder, llm, device, run, title)
        keep_shards(options, corpus.identity, place)
        _pack(options, corpus, place)
        lines = list(_found(corpus))
        for line in lines:
            say(line)
        facts = _derive(options, corpus, encoder, place)
        main, way = main_recipe(facts, encoder, llm, device, run, title)
        path = options.out.absolute() / f"{options.name}.yaml"
        short = try_recipe(main, path, facts, device, f"{options.run_folder}-try")
        (place / path.name).write_text(main.text, encoding="utf-8")
        _preflight(main, place, options)
        (place / "try.yaml").write_text(short.text, encoding="utf-8")
        last = [*_expected(way, main, device), *commands(options, facts, main, short)]
        finish(options, corpus.identity, place, last)
    for line in last:
        say(line)


# -- data ----------------------------------------------------------------------------------------


def _read(sources: list[Source], options: Options, place: Path) -> Corpus:
    if sources[0].form is SHARDS:
        found = read_shard_corpus(sources, options.lang)
        corpus = Corpus(
            sources, found.identity, found.data, found.text, found.keys, found.sets,
            lines=[*report.texts(found.text)], notes=found.notes,
        )  # fmt: skip
    else:
        scratch = scratch_folder(place)
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        read = scan(sources, options.lang, scratch / "utterances", scratch)
        data, notes = assign_sets(read.sets, read.set_N, read.keys)
        rates, _ = prepare.rates(read.entries)
        corpus = Corpus(
            sources, read.identity, data, read.text, read.keys, scan=read,
            lines=[*report.texts(read.text), report.audio(rates)], notes=notes,
        )  # fmt: skip
    corpus.notes += shared(corpus.data, corpus.keys)
    if copies := report.copies(corpus.keys):
        corpus.notes.append(copies)
    return corpus


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
        path = options.text.absolute() if options.text else final / "text.txt"
        made["sentences"] = glob.escape(str(path)) if glob.has_magic(str(path)) else str(path)
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
    here, final = str(place) + os.sep, str(options.out.absolute()) + os.sep

    def moved(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: moved(item) for key, item in value.items()}
        if isinstance(value, list):
            return [moved(item) for item in value]
        is_path = isinstance(value, str) and value.startswith(final)
        return here + value.removeprefix(final) if is_path else value

    values = moved(config.to_plain(main.recipe))
    preflight.check(Builder(config.build(Recipe, values)))


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
    facts = _facts_ahead(options, corpus)
    corpus.sets = [*facts.sets]
    for line in _found(corpus, about=corpus.scan is not None):
        say(line)
    say("nothing was written (--dry-run)")
    if llm is None:
        return
    final = options.out.absolute()
    main, way = main_recipe(facts, encoder, llm, device, str(options.run_folder), _title(options))
    for line in [*_expected(way, main, device), "", f"{final / options.name}.yaml would be:", "",
                 *main.text.splitlines()]:  # fmt: skip
        say(line)


def _facts_ahead(options: Options, corpus: Corpus) -> Facts:
    """What is known before anything is packed, with the files that will be computed named."""
    final, sets = options.out.absolute(), corpus.sets
    if corpus.scan is not None:
        sets = [_unpacked(options, corpus.scan, one) for one in corpus.data]
    return Facts(
        tuple(sets), corpus.text, prepare.choose_units(corpus.text),
        str(final / "units.json"), str(final / "cmvn.json"),
        str(options.text or final / "text.txt"),
    )  # fmt: skip


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
