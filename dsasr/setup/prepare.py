"""Packs the sets of a scanned corpus, and computes what its encoder and CTC head want of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dsasr.data.audio.files import ERRORS, AudioError, claimed_frames, open_audio
from dsasr.data.manifests.entry_file import EntryFile
from dsasr.data.shards.pack import BAD, PackConfig, pack
from dsasr.data.shards.statistics import feature_sums, unit_vocab
from dsasr.data.text.build_phonemizer import PhonemizerConfig, build_phonemizer
from dsasr.setup.facts import ReadySet
from dsasr.setup.lengths import Lengths
from dsasr.setup.parts import is_installed
from dsasr.setup.scan import Scan
from dsasr.setup.splits import DataSet
from dsasr.setup.text_survey import TextSurvey, sentence_of
from dsasr.utils.errors import UserError
from dsasr.utils.hashing import hash64
from dsasr.utils.io import atomic_path

SHARD_SIZES = (50, 500)  # samples of a shard; a set has eight of them at least, if it is that large
CMVN_SHARDS = 64  # of 500 shuffled utterances: enough for a mean and a variance (**ours**)
HEADERS = 200  # files whose rate is looked at
SENTENCES = 200_000  # of the training transcripts, for text-only training


def pack_sets(
    scan: Scan, sets: Sequence[DataSet], folder: Path, final: Path, processes: int | None = None
) -> tuple[list[ReadySet], list[str]]:
    """Shards of each set in ``folder``, which will be renamed to ``final``; lines on what was left
    out. Raises `UserError`, also for a set of which no recording can be read."""
    ready, notes, left_out = [], [], scan.left_out
    for one in sets:
        least, most = SHARD_SIZES
        config = PackConfig(min(most, max(least, len(one.chosen) // 8)))
        out = folder / one.name
        summary = pack(scan.entries.select(one.chosen), out, config, processes, left_out)
        left_out = []
        if not summary["samples"]:
            raise UserError(
                f"none of the {len(one.chosen):,} recordings of {one.name} can be read: "
                f"{_first_cause(out / BAD)}"
            )
        if summary["bad"]:
            notes.append(f"{one.name}: {summary['bad']:,} left out, see {final / one.name / BAD}")
        if summary["repaired"]:
            notes.append(
                f"{one.name}: {summary['repaired']:,} durations of the manifest were wrong; the "
                "audio's are stored"
            )
        tars = tuple(sorted(out.glob("*.tar")))
        lengths = Lengths.of_shards(tars)
        ready.append(ReadySet(one.name, one.role, str(final / one.name), tars, lengths))
    return ready, notes


def _first_cause(path: Path) -> str:
    try:
        with open(path, encoding="utf-8") as file:
            return " ".join(file.readline(400).split())
    except OSError:
        return "see its bad_samples.jsonl"


def rates(entries: EntryFile) -> tuple[Counter[int], np.ndarray]:
    """(sampling rates of up to `HEADERS` files of the corpus, their seconds [n] float32)."""
    found: Counter[int] = Counter()
    seconds = []
    for i in np.unique(np.linspace(0, len(entries) - 1, HEADERS).astype(int)):
        entry = entries[int(i)]
        try:
            with open_audio(entry.audio) as file:
                found[file.samplerate] += 1
                length = claimed_frames(file) / max(file.samplerate, 1)
        except (AudioError, OSError, *ERRORS):
            continue  # packing names it
        part = entry.start is not None
        seconds.append((entry.end or length) - entry.start if part else length)
    return found, np.array(seconds, np.float32)


def choose_units(text: TextSurvey) -> str:
    """The kind of the CTC head's units: letters, or where those are thousands phonemes, if there is
    a phonemizer."""
    if text.is_han and is_installed("espeakng_loader"):
        return "espeak"
    return "characters"


def write_units(tars: Sequence[Path], kind: str, path: Path) -> str:
    """The vocabulary of the units; a line on it. Raises `UserError`."""
    vocab, causes, unknown = unit_vocab(tars, build_phonemizer(PhonemizerConfig(kind)))
    vocab.save(path)
    words = [f"{len(vocab)} units ({kind})"]
    if unknown:
        names = ", ".join(f"'{lang}'" for lang in unknown)
        words.append(f"espeak-ng does not know {names} and reads it as English: see --lang")
    if causes:
        words.append(f"{causes.total():,} transcripts without: {causes.most_common(1)[0][0]}")
    return "; ".join(words)


def write_cmvn(tars: Sequence[Path], mels: int, path: Path) -> str:
    """Mean and variance of the features; a line on them. Raises `UserError`."""
    step = max(1, len(tars) // CMVN_SHARDS)
    sums, _ = feature_sums(tars[::step], mels)
    sums.result().save(path)
    return f"mean and variance of {sums.count:,} frames"


def write_sentences(texts, path: Path) -> int:
    """Distinct transcripts, one a line, up to `SENTENCES`; returns how many."""
    seen: set[int] = set()
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for text in texts:
            line = " ".join(text.split())
            key = hash64(sentence_of(line))
            if line and key not in seen:
                seen.add(key)
                file.write(line + "\n")
            if len(seen) >= SENTENCES:
                break
    return len(seen)
