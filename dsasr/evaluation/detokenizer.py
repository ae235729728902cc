"""From tokens back to text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Detokenizer(Protocol):
    """The part of a tokenizer that decoding needs."""

    end_id: int

    def decode(self, ids: Sequence[int]) -> str: ...
