"""Doubt: why the text of a segment may be wrong, by the segment alone; `MEANING` has the kinds."""

from __future__ import annotations

from dataclasses import dataclass

from dsasr.data.speech_statistics import SpeechStatistics, characters
from dsasr.evaluation.hallucination import HallucinationConfig, chat_phrase, max_repeats
from dsasr.evaluation.normalize import units

# Rates are compared with the training's 99.9% and 0.1% quantiles; `dsasr.inference.joining` doubts
# joins.
MEANING = {
    "cut": "cut off at the token limit",
    "too_long": "more text than anyone says in that time",
    "too_short": "less text than anyone says in that time",
    "loop": "the same words again and again",
    "chat": "a phrase of an assistant, the prompt or subtitles",
    "unheard": "the CTC head gives these words a low probability",
    "join": "two overlapping pieces have no word in common",
}


@dataclass(frozen=True)
class DoubtConfig:
    """Thresholds (**ours**). ``margin``: nats per phoneme by which the transcript may be less
    probable to the CTC head than what it writes itself; `dsasr evaluate --tune` finds it."""

    margin: float = 1.5
    slack: float = 1.2  # share by which a rate may exceed those of the training
    characters: int = 2  # of too_long and too_short: those that do not count


def find_doubt(
    text: str,
    *,
    seconds: float,
    finished: bool,
    ctc_margin: float | None,
    speech: SpeechStatistics,
    config: DoubtConfig,
    lang: str = "",
) -> tuple[str, ...]:
    """The kinds of doubt (`MEANING`) about ``text`` for ``seconds`` of speech, but join.

    ``ctc_margin``: nats per phoneme below what the CTC head wrote (0 or negative); None: unknown.
    """
    if not text:
        return ()
    found = [] if finished else ["cut"]
    rates, count = speech.rates(text), characters(text)
    if rates is not None and seconds > 0:
        slowest, fastest = rates[0] / config.slack, rates[1] * config.slack
        if count - config.characters > fastest * seconds:
            found.append("too_long")
        elif count + config.characters < slowest * seconds:
            found.append("too_short")
    rules = HallucinationConfig()
    if max_repeats(units(text, lang, "plain"), rules.loop_period) >= rules.loop_repeats:
        found.append("loop")
    if chat_phrase(text):
        found.append("chat")
    if ctc_margin is not None and ctc_margin < -config.margin:
        found.append("unheard")
    return tuple(found)
