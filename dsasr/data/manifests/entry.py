"""What every reader of a corpus yields, and what it is given."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dsasr.data.shards.sample import DroppedSample
from dsasr.utils.errors import UserError


@dataclass(frozen=True)
class ManifestEntry:
    """One utterance of a corpus. ``start`` and ``end`` (s) cut it out of a longer recording."""

    id: str
    audio: Path
    text: str
    speaker: str = ""
    lang: str = ""
    duration: float = 0.0  # seconds as the manifest claims; 0: it claims none
    start: float | None = None
    end: float | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    split: str = ""  # train-clean-100, dev …, where the corpus has several


@dataclass(frozen=True)
class Manifest:
    """A corpus: its utterances, and those that are left out of it as (cause, file, id, detail)."""

    utterances: list[ManifestEntry]
    left_out: tuple[DroppedSample, ...] = ()


@dataclass(frozen=True)
class Corpus:
    """What a reader is given: where the corpus lies, and what the user says about it.

    ``lang``: of utterances that name none; ``split``: train, dev or test, where ``path`` holds
    several; ``every_split``: all of them are read, and each utterance names its own; ``scratch``:
    a folder for audio that lies in archives, None: there is none.
    """

    path: Path
    lang: str = ""
    split: str = ""
    scratch: Path | None = None
    every_split: bool = False
    left_out: list[DroppedSample] = field(default_factory=list)

    def leave_out(self, cause: str, id: str, detail: str) -> None:
        self.left_out.append((cause, str(self.path), id, detail))

    def folder_for_audio(self) -> Path:
        """Raises `UserError` where there is none."""
        if self.scratch is None:
            raise UserError(f"{self.path} holds audio in archives: unpack it first")
        self.scratch.mkdir(parents=True, exist_ok=True)
        return self.scratch


@dataclass(frozen=True)
class Form:
    """A form that corpora have. ``read`` raises `UserError`; an utterance without an id has ""."""

    name: str
    title: str
    recognizes: Callable[[Path], bool]
    read: Callable[[Corpus], Iterator[ManifestEntry]]
    splits: bool = False  # whether one may hold several of train, dev and test
