"""What is known of prepared data when its recipe is written."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dsasr.data.shards.sample import OWN_FIELDS, SampleFields
from dsasr.setup.lengths import Lengths
from dsasr.setup.text_survey import TextSurvey


@dataclass(frozen=True)
class ReadySet:
    """A set that can be trained on: ``shards`` as a recipe names them."""

    name: str
    role: str
    shards: str | list[str]
    tars: tuple[Path, ...]
    lengths: Lengths
    fields: SampleFields | None = None  # where labels stand; None: as in our own shards

    @property
    def entry(self) -> dict:
        """Its entry in data.train or data.valid."""
        values: dict = {"name": self.name, "shards": self.shards}
        if self.fields is not None and self.fields != OWN_FIELDS:
            own = vars(OWN_FIELDS)
            values["fields"] = {k: v for k, v in vars(self.fields).items() if v != own[k]}
        return values


@dataclass(frozen=True)
class Facts:
    """What is known of the data. ``phonemes``, ``cmvn``, ``sentences``: files that were made of
    it; empty: not made."""

    sets: tuple[ReadySet, ...]
    text: TextSurvey
    units: str = "characters"  # kind of the CTC head's units, where it has any
    phonemes: str = ""
    cmvn: str = ""
    sentences: str = ""  # text to read without speech

    def of_role(self, role: str) -> list[ReadySet]:
        return [one for one in self.sets if one.role == role]

    @property
    def training(self) -> Lengths:
        return Lengths.joined([one.lengths for one in self.of_role("train")])

    @property
    def hours(self) -> float:
        """Hours of training speech."""
        return self.training.hours

    def share_longer(self, seconds: float) -> float:
        """Share of the training utterances that are longer than ``seconds``."""
        lengths = self.training.seconds
        return float(np.mean(lengths > seconds)) if len(lengths) else 0.0
