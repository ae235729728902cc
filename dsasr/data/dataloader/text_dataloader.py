"""Batches of text without speech: transcripts, and their units as a CTC head would write them.

The order of an epoch does not depend on the number of ranks: lines are shuffled, sorted by length
within windows, and the windows' runs of equal length shuffled again. A step takes the next lines of
that order, so that every line is read exactly once in an epoch, also when a resumed run has another
number of ranks.
"""

from __future__ import annotations

import glob
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dsasr.data.batch import Batch
from dsasr.data.dataloader.collate import pad
from dsasr.data.dataloader.text_encoder import TextEncoder
from dsasr.data.dataloader.window_plan import stable_hash
from dsasr.data.shards.sample import BadSample, DroppedSample, Sample
from dsasr.data.text.ctc_noise import Confusions, CtcNoise
from dsasr.utils import ranges
from dsasr.utils.errors import UserError, first_line
from dsasr.utils.io import read_lines
from dsasr.utils.ranges import Dropout, PositiveInt, Share

JSON_LINES = (".jsonl", ".ndjson", ".json")
REPEATS = 8  # of an utterance's noise, until something is written


@dataclass(frozen=True)
class TextOnlyConfig:
    """Text to train on without speech, and the errors in its units."""

    # text files (one sentence a line), JSON lines (.jsonl, .ndjson, .json) or parquet with "text";
    # paths or globs
    path: str | tuple[str, ...] = ()
    lang: str = ""  # language of the text, for the phonemizer; JSONL and parquet may have "lang"
    samples: PositiveInt = 32  # sentences of a micro-batch of a rank
    max_characters: PositiveInt = 300  # longer sentences are left out
    # sentences that are sorted by length together, so that batches need little padding; 1: unsorted
    window: PositiveInt = 4096
    # how often the CTC head writes what, by `dsasr data confusions`; empty: the rates below
    confusions: str = ""
    substitutions: Share = 0.1  # share of the units that are replaced; without confusions
    deletions: Share = 0.05  # share of the units that are left out; without confusions
    insertions: Dropout = 0.03  # units inserted before each unit; without confusions

    def __post_init__(self) -> None:
        ranges.check(self)
        if not self.path:
            raise UserError("data.text_only.path: give text, JSONL or parquet files")
        if self.substitutions + self.deletions > 1:
            raise UserError("data.text_only: substitutions + deletions must be at most 1")

    def files(self) -> list[Path]:
        """The files that ``path`` names, in order. Raises `UserError` where it names none."""
        paths = (self.path,) if isinstance(self.path, str) else self.path
        files = []
        for pattern in paths:
            names = sorted(glob.glob(pattern)) if glob.has_magic(pattern) else [pattern]
            if not names or not all(map(Path.is_file, map(Path, names))):
                raise UserError(f"data.text_only.path: there is no {pattern}")
            files += map(Path, names)
        return files


@dataclass(frozen=True)
class Line:
    """A sentence, and where it stands."""

    text: str
    lang: str
    file: str
    number: int  # from 1


def load_text(cfg: TextOnlyConfig) -> list[Line]:
    """All sentences that are neither empty nor too long. Raises `UserError` if there are none."""
    lines = []
    for file in cfg.files():
        for number, (text, lang) in enumerate(_read(file), 1):
            if text.strip() and len(text) <= cfg.max_characters:
                lines.append(Line(text.strip(), lang or cfg.lang, str(file), number))
    if not lines:
        raise UserError("data.text_only.path: its files hold no sentence of a usable length")
    return lines


def _read(file: Path) -> Iterator[tuple[str, str]]:
    """(text, lang) of each line; lang is empty where the file has none."""
    suffix = file.suffix.lower()
    if suffix == ".parquet":
        yield from _read_parquet(file)
        return
    try:
        lines = read_lines(file)
    except UnicodeDecodeError:
        raise UserError(f"{file} is no UTF-8 text: unpack or convert it first") from None
    for number, line in enumerate(lines, 1):
        if suffix not in JSON_LINES:
            yield line, ""
            continue
        try:
            values = json.loads(line) if line.strip() else {"text": ""}
            text, lang = values["text"], values.get("lang", "")
            if not isinstance(text, str) or not isinstance(lang, str):
                raise TypeError
            yield text, lang
        except (ValueError, TypeError, KeyError):
            raise UserError(f"{file}:{number}: not a JSON object with a string 'text'") from None


def _read_parquet(file: Path) -> Iterator[tuple[str, str]]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise UserError(f"{file}: reading parquet needs pyarrow: pip install pyarrow") from None
    try:
        table = parquet.ParquetFile(file)
        schema = table.schema_arrow
        columns = [name for name in ("text", "lang") if name in schema.names]
        if "text" not in columns:
            raise UserError(f"{file} has no column 'text', but {', '.join(schema.names)}")
        for name in columns:
            if "string" not in (kind := str(schema.field(name).type)):
                raise UserError(f"{file}: column '{name}' holds {kind}, not strings")
        for batch in table.iter_batches(columns=columns):
            for row in batch.to_pylist():
                yield row["text"] or "", row.get("lang") or ""
    except (ArrowException, OSError) as error:
        raise UserError(f"{file} cannot be read: {first_line(error)}") from None


class TextDataLoader(Iterator[Batch]):
    """One rank's endless batches of text; ``state()`` is the cursor after the last one.

    All ranks must pass the same arguments except ``rank``. A rank's batch always has a sentence.
    """

    def __init__(
        self,
        cfg: TextOnlyConfig,
        text: TextEncoder,
        bins: int,
        *,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        state: Mapping[str, Any] | None = None,
        lines: Sequence[Line] | None = None,
    ) -> None:
        """``bins``: F of the batches' features [B, 0, F]; ``lines``: the text, in place of the
        files of ``cfg``."""
        self.cfg, self.text, self.bins = cfg, text, bins
        self.seed, self.rank, self.world = seed, rank, world
        units = text.vocab.symbols
        self.noise = CtcNoise(
            Confusions.load(cfg.confusions, units)
            if cfg.confusions
            else Confusions.uniform(units, cfg.substitutions, cfg.deletions, cfg.insertions)
        )
        self.lines = load_text(cfg) if lines is None else lines
        self._epoch, self._position = 0, 0
        self._order = self._epoch_order(0)
        if state is not None:
            self._load(state)

    def state(self) -> dict[str, Any]:
        return {"epoch": self._epoch, "line": self._position, "lines": len(self.lines)}

    def _load(self, state: Mapping[str, Any]) -> None:
        if state["lines"] != len(self.lines):
            raise UserError(
                f"data.text_only.path has {len(self.lines):,} sentences, {state['lines']:,} when "
                "the run was saved: give the same files, or start a new run"
            )
        self._epoch, self._position = state["epoch"], state["line"]
        self._order = self._epoch_order(self._epoch)

    def _rng(self, *key: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, *key])

    def _epoch_order(self, epoch: int) -> np.ndarray:
        rng = self._rng(0, epoch)
        order = rng.permutation(len(self.lines))
        lengths = np.array([len(line.text) for line in self.lines])
        runs: list[np.ndarray] = []
        size = max(self.cfg.window, self.cfg.samples)
        for start in range(0, len(order), size):
            window = order[start : start + size]
            window = window[np.argsort(lengths[window], kind="stable")]
            cuts = range(self.cfg.samples, len(window), self.cfg.samples)
            split = np.split(window, list(cuts))
            runs += [split[i] for i in rng.permutation(len(split))]
        return np.concatenate(runs)

    def _take(self, count: int) -> list[tuple[int, int]]:
        """The next ``count`` (epoch, line) of all ranks."""
        taken = []
        while len(taken) < count:
            if self._position == len(self._order):
                self._epoch, self._position = self._epoch + 1, 0
                self._order = self._epoch_order(self._epoch)
            end = min(self._position + count - len(taken), len(self._order))
            taken += [(self._epoch, int(i)) for i in self._order[self._position : end]]
            self._position = end
        return taken

    def __next__(self) -> Batch:
        epoch, first = self._epoch, self._position
        taken = self._take(self.cfg.samples * self.world)[self.rank :: self.world]
        rows, hints, bad = [], [], []
        for line_epoch, index in taken:
            try:
                rows.append(self._encode(line_epoch, index))
                own_seed = stable_hash("text", self.seed, line_epoch, index)
                hints.append(self.text.hint(self.lines[index].lang, own_seed))
            except BadSample as error:
                bad.append(error.record)
        if not rows:
            cause, _, key, detail = bad[0]
            raise UserError(
                f"none of {len(bad)} sentences of data.text_only can be used; {key}: {cause} "
                f"({detail})"
            )
        seed = int(self._rng(1, epoch, first).integers(1 << 62))
        return self._batch(rows, hints, bad, seed, epoch)

    def _encode(self, epoch: int, index: int) -> tuple[Line, list[int], list[int]]:
        """(line, written units, tokens). Raises `BadSample`."""
        line = self.lines[index]
        sample = Sample(
            key=f"{line.file}:{line.number}", shard=line.file, audio=b"", extension="",
            text=line.text, lang=line.lang, speaker="", duration=0.0, phonemes=None,
            alignment=None, meta={},
        )  # fmt: skip
        _, units, tokens = self.text.encode(sample)
        rng = self._rng(2, epoch, index)
        for _ in range(REPEATS):
            if written := self.noise.write(units, rng):
                return line, written, tokens
        return line, units[:1], tokens

    def _batch(
        self,
        rows: Sequence[tuple[Line, list[int], list[int]]],
        hints: Sequence[str],
        bad: Sequence[DroppedSample],
        seed: int,
        epoch: int,
    ) -> Batch:
        lines, units, tokens = zip(*rows, strict=True)
        units_BP, unit_lengths_B = map(torch.from_numpy, pad(units))
        tokens_BU, token_lengths_B = map(torch.from_numpy, pad(tokens, self.text.pad_id))
        return Batch.blank(
            torch.zeros(len(rows), 0, self.bins),
            phonemes_BP=units_BP,
            phoneme_lengths_B=unit_lengths_B,
            tokens_BU=tokens_BU,
            token_lengths_B=token_lengths_B,
            keys=tuple(f"{line.file}:{line.number}" for line in lines),
            shards=tuple(line.file for line in lines),
            texts=tuple(line.text for line in lines),
            langs=tuple(line.lang for line in lines),
            hints=tuple(hints),
            seed=seed,
            epoch=epoch,
            state=self.state(),
            bad=tuple(bad),
        )
