"""A corpus of shards that are there already: surveyed, split by whole tars, left where it lies."""

from __future__ import annotations

import glob
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from dsasr.data.shards.build_index import read_texts
from dsasr.data.shards.index import index_path
from dsasr.data.shards.sample import OWN_FIELDS, BadSample, SampleFields
from dsasr.data.shards.writer import DATASET
from dsasr.setup.facts import ReadySet
from dsasr.setup.layouts import Source, role_of
from dsasr.setup.lengths import Lengths
from dsasr.setup.scan import UtteranceKeys, script_lang
from dsasr.setup.shard_sets import fields_of, tars_of
from dsasr.setup.splits import DataSet, size_of_made
from dsasr.setup.text_survey import TextSurvey, sentence_of
from dsasr.utils.errors import UserError
from dsasr.utils.hashing import hash64
from dsasr.utils.progress import Bar


@dataclass
class ShardCorpus:
    """Sets of shards; ``data`` and ``keys`` as of a corpus that is packed (`dsasr.setup.scan`)."""

    sets: list[ReadySet]
    data: list[DataSet]
    keys: UtteranceKeys
    text: TextSurvey
    identity: str
    notes: list[str]


@dataclass
class _Tar:
    path: Path
    place: str  # the folder or list that names it
    name: str
    role: str
    fields: SampleFields
    first: int = 0  # index of its first utterance
    count: int = 0


def read_shard_corpus(sources: Sequence[Source], lang: str) -> ShardCorpus:
    """Raises `UserError` where tars cannot be read, or are too few to be split."""
    tars, text, notes = _tars(sources, lang), TextSurvey(), []
    rows = [array("Q") for _ in range(4)]
    seconds, characters = array("f"), array("i")
    bad: Counter[str] = Counter()
    identity = total = 0
    for tar in Bar(tars, desc="reading shards", unit="shard", delay=3):
        tar.first = total
        for sample in read_texts(tar.path, tar.fields):
            if isinstance(sample, BadSample):
                bad[sample.cause] += 1
                continue
            total += 1
            own_lang = sample.lang or script_lang(sample.text)
            text.add(sample.text, own_lang)
            speaker = hash64(sample.speaker) if sample.speaker else 0
            sentence = hash64(sentence_of(sample.text))
            copy = hash64(f"{sample.duration:.3f}|{sample.text}")
            for row, key in zip(rows, (speaker, sentence, 0, copy), strict=True):
                row.append(key)
            seconds.append(sample.duration)
            characters.append(len(sample.text))
        tar.count = total - tar.first
        identity += hash64(f"{tar.path.name}|{tar.path.stat().st_size}|{tar.count}")
    if not total:
        causes = ", ".join(f"{cause} {n}" for cause, n in bad.most_common(3))
        raise UserError(f"{sources[0].path}: its shards have no sample ({causes or 'empty'})")
    if bad:
        causes = ", ".join(f"{cause} {n:,}" for cause, n in bad.most_common(4))
        notes.append(f"left out: {causes}; `dsasr data verify` names them")
    notes += _hold_out(tars)
    lengths = Lengths(np.array(seconds, np.float32), np.array(characters, np.int32))
    sets, data = [], []
    for name, role in dict.fromkeys((tar.name, tar.role) for tar in tars):
        own = [tar for tar in tars if (tar.name, tar.role) == (name, role)]
        chosen = np.concatenate([np.arange(t.first, t.first + t.count) for t in own])
        data.append(DataSet(name, role, chosen))
        part = Lengths(lengths.seconds[chosen], lengths.characters[chosen])
        paths = tuple(tar.path for tar in own)
        sets.append(ReadySet(name, role, _spec(own, tars), paths, part, own[0].fields))
    if not all(index_path(tar.path).is_file() for tar in tars):
        notes.append(
            "the tars have no indexes, so each start reads them all: `dsasr data index` writes them"
        )
    return ShardCorpus(
        sets, data, UtteranceKeys.of(rows), text, f"{identity % (1 << 64):016x}", notes
    )


def _tars(sources: Sequence[Source], lang: str) -> list[_Tar]:
    found = []
    for source in sources:
        paths = tars_of(source.path)
        fields = fields_of(paths[0]) or OWN_FIELDS
        if lang:
            fields = replace(fields, default_lang=lang)
        elif not fields.default_lang:
            first = next(
                (s for s in read_texts(paths[0], fields) if not isinstance(s, BadSample)), None
            )
            if first is not None and not first.lang:
                fields = replace(fields, default_lang=script_lang(first.text))
        name = source.split or "train"
        place = str(source.path.resolve())
        for path in paths:
            found.append(_Tar(path.resolve(), place, name, role_of(name) or "train", fields))
    if not any(tar.role == "train" for tar in found):
        names = " and ".join(dict.fromkeys(tar.name for tar in found))
        raise UserError(f"there are shards of {names} alone: give the training data, too")
    return found


def _hold_out(tars: list[_Tar]) -> list[str]:
    """Make the validation and test sets that are missing of whole tars of the training data, in the
    order of their names' hashes; a line on them."""
    made = [role for role in ("valid", "test") if not any(tar.role == role for tar in tars)]
    pool = [tar for tar in tars if tar.role == "train"]
    if not made:
        return []
    total = sum(tar.count for tar in pool)
    wanted, words = size_of_made(total), []
    order = iter(sorted(pool, key=lambda tar: hash64(tar.path.name)))
    for role in made:
        held = 0
        while held < wanted and (tar := next(order, None)) is not None:
            tar.name = tar.role = role
            held += tar.count
        words.append(f"{role} ({held:,})")
    if 2 * sum(tar.count for tar in pool if tar.role == "train") < total:
        raise UserError(
            f"{len(pool)} tars are too few to take {' and '.join(made)} out of: put those into "
            "folders of their own (train/, valid/, test/), or pack the corpus itself"
        )
    return [f"made of whole tars of the training data: {' and '.join(words)}"]


def _spec(own: Sequence[_Tar], tars: Sequence[_Tar]) -> str | list[str]:
    """The shards as a recipe names them: their folder where the set is all of it, else each."""
    places = {tar.place for tar in own}
    place = Path(own[0].place)
    alone = all(tar.name == own[0].name for tar in tars if tar.place in places)
    if len(places) == 1 and alone and place.is_dir():
        return str(place) if (place / DATASET).is_file() else f"{glob.escape(str(place))}/*.tar"
    return [str(tar.path) for tar in own]
