"""What the utterances of a training were like: their lengths, pauses and speaking rates.

A recognizer stays within them: longer audio is cut into segments as long as the training's
utterances, and text that is too long or too short for its speech is marked as doubtful.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from dsasr.data.audio.activity import spoken_part
from dsasr.data.text.scripts import HAN_CHARACTER

LEVELS = (0.001, 0.05, 0.5, 0.95, 0.99, 0.999)  # of the quantiles that are kept
HAN, OTHER = "han", "other"  # scripts: a Han character takes as long as several letters
SAMPLES = 1000  # utterances that are measured


@dataclass(frozen=True)
class Utterance:
    """What is measured of one utterance. ``spoken``: seconds from its first to its last sound."""

    seconds: float
    spoken: float
    pause: float
    text: str
    tokens: int
    lang: str = ""


@dataclass(frozen=True)
class SpeechStatistics:
    """Quantiles at `LEVELS` over ``utterances`` of a training; empty where there are none.

    ``seconds``: of an utterance; ``pause``: the longest one inside it, in seconds; ``chars``:
    characters without spaces per second of speech, by script; ``tokens``: LLM tokens per second of
    the utterance; ``langs``: the languages of each script.
    """

    utterances: int = 0
    seconds: tuple[float, ...] = ()
    pause: tuple[float, ...] = ()
    tokens: tuple[float, ...] = ()
    chars: dict[str, tuple[float, ...]] | None = None
    langs: dict[str, tuple[str, ...]] | None = None

    @classmethod
    def of(cls, utterances: Iterable[Utterance]) -> SpeechStatistics:
        rows = [u for u in utterances if u.text and u.spoken > 0]
        if not rows:
            return cls()
        rates: dict[str, list[float]] = {}
        langs: dict[str, set[str]] = {}
        for u in rows:
            langs.setdefault(script_of(u.text), set()).add(u.lang)
            rates.setdefault(script_of(u.text), []).append(characters(u.text) / u.spoken)
        return cls(
            len(rows),
            _quantiles([u.seconds for u in rows]),
            _quantiles([u.pause for u in rows]),
            _quantiles([u.tokens / u.seconds for u in rows]),
            {script: _quantiles(values) for script, values in sorted(rates.items())},
            {script: tuple(sorted(names)) for script, names in sorted(langs.items())},
        )

    def quantile(self, name: str, level: float) -> float | None:
        """That of ``seconds``, ``pause`` or ``tokens`` at one of `LEVELS`; None if not known."""
        values: Sequence[float] = getattr(self, name)
        return values[LEVELS.index(level)] if values else None

    def rates(self, text: str) -> tuple[float, float] | None:
        """The slowest and the fastest characters per second (0.1% and 99.9%) of speech in the
        script of ``text``; None if not known."""
        values = (self.chars or {}).get(script_of(text))
        return (values[0], values[-1]) if values else None

    def language(self, text: str) -> str:
        """The language of ``text`` by its script: the only one that the training had in it, else
        ``zh`` of Han text, else "" (not known)."""
        script = script_of(text)
        known = [name for name in (self.langs or {}).get(script, ()) if name]
        if len(known) == 1:
            return known[0]
        return "zh" if script == HAN and text else ""


def measure(wave: np.ndarray, rate: int, text: str, tokens: int, lang: str = "") -> Utterance:
    """One utterance of the training."""
    start, end, pause = spoken_part(wave, rate)
    return Utterance(len(wave) / rate, end - start, pause, text, tokens, lang)


def script_of(text: str) -> str:
    """`HAN` where most characters are Han, else `OTHER`."""
    han = len(HAN_CHARACTER.findall(text))
    return HAN if 2 * han > characters(text) else OTHER


def characters(text: str) -> int:
    """Characters without spaces."""
    return len("".join(text.split()))


def _quantiles(values: Sequence[float]) -> tuple[float, ...]:
    return tuple(round(float(v), 4) for v in np.quantile(np.asarray(values, np.float64), LEVELS))
