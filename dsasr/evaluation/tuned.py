"""What was tuned on a validation set after a training: ``tuned.json`` in the run's folder."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path

from dsasr import config
from dsasr.evaluation.decode import DecodeConfig
from dsasr.evaluation.doubt import DoubtConfig
from dsasr.utils.errors import UserError
from dsasr.utils.io import atomic_write, to_json

FILE = "tuned.json"


@dataclass(frozen=True)
class Tuned:
    """``ctc_weight`` for beams of at least two (None: not tuned), and the thresholds of doubt."""

    ctc_weight: float | None = None
    doubt: DoubtConfig = field(default_factory=DoubtConfig)

    def decode(self, cfg: DecodeConfig) -> DecodeConfig:
        """``cfg`` with the tuned weight, where it has a beam that can use it."""
        if self.ctc_weight is None or cfg.beam == 1:
            return cfg
        return replace(cfg, ctc_weight=self.ctc_weight)

    def save(self, folder: Path) -> None:
        atomic_write(folder / FILE, to_json(config.to_plain(self), indent=1) + "\n")

    @classmethod
    def load(cls, folder: Path) -> Tuned:
        """Of a run's ``folder``; the defaults where nothing was tuned. Raises `UserError`."""
        try:
            values = json.loads((folder / FILE).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return cls()
        except (OSError, ValueError) as error:
            raise UserError(f"{folder / FILE} cannot be read: {error}; tune again") from None
        return config.build(cls, values)
