"""What `dsasr init` says of a corpus, in lines."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from dsasr.setup.facts import ReadySet
from dsasr.setup.layouts import Source
from dsasr.setup.lengths import Lengths
from dsasr.setup.scan import UtteranceKeys
from dsasr.setup.splits import DataSet
from dsasr.setup.text_survey import TextSurvey

_SHOWN = 6  # languages, sampling rates


def layout(sources: Sequence[Source]) -> Iterator[str]:
    for source in sources:
        yield f"{source.path}: {source.form.title}"


def set_table(
    sets: Sequence[ReadySet], data: Sequence[DataSet], keys: UtteranceKeys, about: bool
) -> Iterator[str]:
    """A line for each set: utterances, hours, speakers. ``about``: hours are estimated."""
    yield f"{'set':<24}{'for':<7}{'utterances':>11}{'hours':>10}{'speakers':>10}"
    for one, chosen in zip(sets, data, strict=True):
        speakers = np.unique(keys.speaker[chosen.chosen])
        count = np.count_nonzero(speakers)
        hours = f"{'~' if about else ''}{one.lengths.hours:,.2f}"
        yield (
            f"{one.name:<24}{one.role:<7}{len(one.lengths):>11,}{hours:>10}"
            f"{f'{count:,}' if count else '?':>10}"
        )


def texts(text: TextSurvey) -> Iterator[str]:
    named = [(lang or "none named", n) for lang, n in text.langs.most_common(_SHOWN)]
    words = ", ".join(f"{lang} {n:,}" for lang, n in named)
    more = len(text.langs) - len(named)
    hint = "" if any(text.langs) else " (say which with --lang: prompts and scores need it)"
    yield f"language: {words}{f' and {more} more' if more > 0 else ''}{hint}"
    yield f"text: {text.form()}"


def audio(rates: Counter[int]) -> str:
    total = rates.total()
    words = ", ".join(f"{rate:,} Hz {n / total:.0%}" for rate, n in rates.most_common(_SHOWN))
    return f"audio: {words}" if total else "audio: no header could be read"


def copies(keys: UtteranceKeys) -> str:
    """On utterances that look like the same recording; "" where there are none."""
    _, counts = np.unique(keys.copy, return_counts=True)
    extra = int((counts - 1).sum())
    if not extra:
        return ""
    return f"{extra:,} utterances look like copies of others: same text, same length or size"


def lengths(sets: Sequence[ReadySet]) -> list[str]:
    return Lengths.joined([one.lengths for one in sets]).table()


def shown(path: Path) -> str:
    """A path for a command line, from the working directory if it is below that."""
    here = Path.cwd()
    path = path.absolute()
    return shlex.quote(str(path.relative_to(here) if path.is_relative_to(here) else path))
