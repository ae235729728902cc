"""The text shown while an utterance goes on: its beginning stays, its last words may change.

LocalAgreement (Liu et al. 2020, arXiv 2005.11185; Machacek et al. 2023, arXiv 2307.14743): the
tokens on which the hypotheses of two chunks in a row agree are settled. The next hypothesis begins
with them, and what is shown beyond them are at most a few words (**ours**).
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from dsasr.data.text.scripts import HAN
from dsasr.evaluation.detokenizer import Detokenizer

_WORD = re.compile(f"[{HAN}]|[^\\s{HAN}]+")
_HAN = re.compile(f"[{HAN}]")
_BROKEN = "\N{REPLACEMENT CHARACTER}"  # of a token that only begins a character


class PartialText:
    """Shown text, of which the last ``words`` words may still change."""

    def __init__(self, words: int):
        self._words = words
        self._before: tuple[int, ...] = ()  # tokens of the hypothesis before
        self.settled: tuple[int, ...] = ()  # tokens that the next hypothesis has to begin with

    def update(self, tokens: Sequence[int], tokenizer: Detokenizer) -> tuple[str, int]:
        """(text to show, how many of its characters are settled), from a new hypothesis' tokens
        after the `settled` ones."""
        hypothesis = (*self.settled, *tokens)
        agreed = 0
        for old, new in zip(self._before, hypothesis, strict=False):
            if old != new:
                break
            agreed += 1
        self._before = hypothesis
        self.settled = hypothesis[: max(agreed, len(self.settled))]
        text = tokenizer.decode(list(hypothesis)).rstrip(_BROKEN)
        sure = _common(tokenizer.decode(list(self.settled)).rstrip(_BROKEN), text)
        end, open_words = 0, 0
        for match in _WORD.finditer(text):
            # A word of letters that ends with the settled text may get more letters.
            sealed = match.end() < len(sure) or (
                match.end() == len(sure) and _HAN.match(match.group()) is not None
            )
            open_words += not sealed
            if open_words > self._words:
                break
            end = match.end()
        lead = len(text) - len(text.lstrip())
        return text[lead:end].rstrip(), max(min(len(sure), end) - lead, 0)


def _common(first: str, second: str) -> str:
    """The longest beginning that both have."""
    count = 0
    for a, b in zip(first, second, strict=False):
        if a != b:
            break
        count += 1
    return first[:count]
