"""One pass over a corpus' manifests: its utterances go to a file, what has to be known of all of
them stays in memory, 40 bytes for each."""

from __future__ import annotations

import os
import re
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from dsasr.data.manifests.entry import Corpus, ManifestEntry
from dsasr.data.manifests.entry_file import EntryFile, EntryWriter
from dsasr.data.manifests.registry import read_entries
from dsasr.data.shards.sample import DroppedSample
from dsasr.data.shards.writer import sample_key
from dsasr.data.text.scripts import HAN_CHARACTER
from dsasr.setup.layouts import Source
from dsasr.setup.text_survey import TextSurvey, sentence_of
from dsasr.utils.errors import UserError
from dsasr.utils.hashing import hash64, repeated
from dsasr.utils.progress import Bar

_KANA, _HANGUL = re.compile("[\u3041-\u30ff]"), re.compile("[\uac00-\ud7af]")


@dataclass
class UtteranceKeys:
    """Hashes of what utterances share, [N] uint64 each; 0: not known.

    ``recording``: of utterances that are parts of a longer one; ``copy``: equal where two are
    likely the same recording.
    """

    speaker: np.ndarray
    sentence: np.ndarray
    recording: np.ndarray
    copy: np.ndarray

    @classmethod
    def of(cls, rows: Sequence[array]) -> UtteranceKeys:
        return cls(*(np.array(row, np.uint64) for row in rows))


@dataclass
class Scan:
    """What a pass over a corpus finds. ``set_N`` [N] int16: each utterance's place in ``sets``."""

    entries: EntryFile
    sets: list[str]  # names of splits, "" of utterances that are in none
    set_N: np.ndarray
    keys: UtteranceKeys
    text: TextSurvey
    claimed_seconds: float  # what manifests say
    claims: int  # utterances whose manifest says it
    identity: str  # a hash of all utterances, whatever folder the corpus lies in
    left_out: list[DroppedSample] = field(default_factory=list)


def scan(sources: Sequence[Source], lang: str, spool: Path, scratch: Path) -> Scan:
    """Read ``sources``; ``spool``: the file that their utterances go to, ``scratch``: a folder for
    audio that lies in archives.

    Raises `UserError` for a malformed manifest, missing audio, an id that repeats in a set or
    cannot be a key, and a corpus without any utterance.
    """
    sets: dict[str, int] = {}
    set_N, ids, rows = array("h"), array("Q"), [array("Q") for _ in range(4)]
    text, left_out, identity = TextSurvey(), [], 0
    missing: list[Path] = []
    lost = claims = 0
    seconds = 0.0
    with EntryWriter(spool) as writer:
        for number, source in enumerate(sources):
            folder = scratch / str(number)
            corpus = Corpus(source.path, lang, scratch=folder, every_split=source.form.splits)
            entries: Iterable[ManifestEntry] = read_entries(source.form, corpus)
            for entry in Bar(entries, desc=f"reading {source.path.name}", unit="row", delay=3):
                if not entry.lang and (guess := script_lang(entry.text)):
                    entry = replace(entry, lang=guess)
                size = _size(entry.audio)
                if size is None:
                    lost += 1
                    missing = missing or [entry.audio]
                    continue
                where = sets.setdefault(entry.split or source.split, len(sets))
                set_N.append(where)
                ids.append(hash64(f"{where} {sample_key(entry.id)}"))
                for row, key in zip(rows, _keys(entry, size), strict=True):
                    row.append(key)
                # An order does not matter to a sum.
                identity += hash64(f"{where}|{entry.id}|{size}|{entry.text}|{entry.speaker}|"
                                   f"{entry.lang}|{entry.start}|{entry.end}")  # fmt: skip
                text.add(entry.text, entry.lang)
                length = entry.duration or ((entry.end or 0.0) - (entry.start or 0.0))
                claims, seconds = claims + (length > 0), seconds + max(length, 0.0)
                writer.append(entry)
            left_out += corpus.left_out
        found = writer.finish()
    names = ", ".join(str(source.path) for source in sources)
    if lost:
        raise UserError(
            f"{names}: {lost:,} of {lost + len(found):,} audio files are missing, the first is "
            f"{missing[0]}"
        )
    if not len(found):
        why = f", only {len(left_out)} without one" if left_out else ""
        raise UserError(f"{names} holds no utterance with a transcript{why}")
    if twice := repeated(ids):
        entry = next(e for e, h in zip(found, ids, strict=True) if h in twice)
        raise UserError(f"{names} has two utterances with the id '{entry.id}' in one set")
    return Scan(
        found, list(sets), np.array(set_N, np.int16), UtteranceKeys.of(rows), text, seconds,
        claims, f"{identity % (1 << 64):016x}", left_out,
    )  # fmt: skip


def script_lang(text: str) -> str:
    """The language that a script alone identifies: ja, ko or zh; "" of all others (**ours**)."""
    if text.isascii():
        return ""
    if _KANA.search(text):
        return "ja"
    if _HANGUL.search(text):
        return "ko"
    return "zh" if HAN_CHARACTER.search(text) else ""


def _size(audio: Path) -> int | None:
    """Bytes of a file; None: it is not there."""
    try:
        return os.stat(audio).st_size
    except OSError:
        return None


def _keys(entry: ManifestEntry, size: int) -> tuple[int, int, int, int]:
    part = entry.start is not None
    place = f"{entry.audio}|{entry.start}|{entry.end}" if part else f"{size}|{entry.text}"
    return (
        hash64(entry.speaker) if entry.speaker else 0,
        hash64(sentence_of(entry.text)),
        hash64(str(entry.audio)) if part else 0,
        hash64(place),
    )
