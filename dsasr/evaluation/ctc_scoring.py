"""Scores of a transcript by the encoder's CTC head: its log-probability, confidences and times.

The language model writes words; the head's posteriors say how well the audio supports them, and
their best alignment says when each was spoken.

All figures are in encoder frames and nats. Definitions (**ours**):

- ``log_prob``: of writing the transcript's units, summed over its pronunciations;
- ``margin``: ``log_prob`` less that of what the head itself writes (its greedy units). It is about
  0 where both agree, however noisy the audio; far below it the audio does not support the text;
- a word's ``confidence``: the geometric mean, over its units, of the highest posterior that the
  unit has on the frames aligned with it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dsasr.data.text.speller import Speller
from dsasr.entropy_allocation import forced_alignment, frame_labels
from dsasr.model.ctc import BLANK, ctc_log_prob, greedy_phonemes

REACH = 3  # blank frames beside a spike that belong to its unit


@dataclass(frozen=True)
class AlignedSpan:
    """A word or a unit on frames ``start`` to ``end`` (exclusive), with its confidence."""

    text: str
    start: int
    end: int
    confidence: float


@dataclass(frozen=True)
class CtcScore:
    """The head's scores of a transcript, as the module defines them. ``units``: how many it has."""

    log_prob: float
    margin: float
    units: int
    words: tuple[AlignedSpan, ...] = ()
    phonemes: tuple[AlignedSpan, ...] = ()

    @property
    def margin_per_unit(self) -> float:
        """How much less probable a unit of the transcript is than what the head wrote itself."""
        return self.margin / max(1, self.units)


def log_prob_of(log_probs_SP: Tensor, pronunciations: Sequence[Sequence[int]]) -> float:
    """The log-probability of a text with these pronunciations, in nats: the logarithm of the sum
    of theirs; -inf where there is none, or too few frames for each."""
    values = [ctc_log_prob(log_probs_SP, units) for units in pronunciations]
    best = max(values, default=-math.inf)
    if best == -math.inf:
        return best
    return best + math.log(sum(math.exp(value - best) for value in values))


def score_text(log_probs_SP: Tensor, text: str, lang: str, speller: Speller) -> CtcScore | None:
    """The scores of ``text`` by the head's posteriors of S frames.

    None where it has none: no units (an unknown word or symbol, no phonemizer), or more units
    than frames.
    """
    log_probs_SP = log_probs_SP.detach().float().cpu()
    pronunciations = speller.pronunciations(text, lang)
    if not pronunciations or not pronunciations[0]:
        return None
    scores = [ctc_log_prob(log_probs_SP, units) for units in pronunciations]
    units = list(pronunciations[scores.index(max(scores))])
    log_prob = log_prob_of(log_probs_SP, pronunciations)
    if log_prob == -math.inf:
        return None
    written = greedy_phonemes(log_probs_SP[None], torch.tensor([len(log_probs_SP)]))[0]
    margin = log_prob - ctc_log_prob(log_probs_SP, written)
    try:
        positions_S = forced_alignment.align(log_probs_SP, units, blank=BLANK, reach=REACH)
    except ValueError:
        return None
    spans = _spans(positions_S, units, log_probs_SP, speller)
    words = _words(spans, text, lang, speller)
    phonemes = tuple(replace(s, confidence=math.exp(s.confidence)) for s in spans)
    return CtcScore(log_prob, margin, len(units), words, phonemes)


def _spans(
    positions_S: Tensor, units: Sequence[int], log_probs_SP: Tensor, speller: Speller
) -> tuple[AlignedSpan, ...]:
    """Each unit's frames, at least one on a CTC path; ``confidence`` is its logarithm here."""
    frames: list[list[int]] = [[] for _ in units]
    for frame, position in enumerate(positions_S.tolist()):
        if position >= 0:
            frames[position].append(frame)
    symbols = speller.vocab.decode(units)
    return tuple(
        AlignedSpan(
            symbol, rows[0], rows[-1] + 1, float(log_probs_SP[rows[0] : rows[-1] + 1, unit].max())
        )
        for symbol, unit, rows in zip(symbols, units, frames, strict=True)
    )


def _words(
    phonemes: Sequence[AlignedSpan], text: str, lang: str, speller: Speller
) -> tuple[AlignedSpan, ...]:
    """The words of ``text`` on their phonemes' frames; one without phonemes has no length and
    stands at the end of the word before it. ``confidence`` of ``phonemes`` is a logarithm."""
    words = forced_alignment.words_of(text)
    symbols = [span.text for span in phonemes]
    of_word = frame_labels.assign_words(symbols, text, lang, speller.phonemizer)
    spans, last = [], phonemes[0].start if phonemes else 0
    for number, word in enumerate(words):
        own = [span for span, index in zip(phonemes, of_word, strict=True) if index == number]
        if own:
            mean = sum(span.confidence for span in own) / len(own)
            spans.append(AlignedSpan(word, own[0].start, own[-1].end, math.exp(mean)))
            last = own[-1].end
        else:
            spans.append(AlignedSpan(word, last, last, 0.0))
    return tuple(spans)


def worst_stretch(words: Sequence[AlignedSpan], count: int = 3) -> float:
    """The lowest mean confidence of ``count`` words in a row (of all, if there are fewer); 1.0 of
    none."""
    if not words:
        return 1.0
    values = [word.confidence for word in words]
    count = min(count, len(values))
    windows = (values[i : i + count] for i in range(len(values) - count + 1))
    return min(sum(window) / count for window in windows)
