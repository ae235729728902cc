"""Tune a recognizer on a validation set: the CTC head's weight in a beam, and when to doubt."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from dsasr.evaluation.decode import DecodeConfig, Hypothesis, decode_nbest
from dsasr.evaluation.error_rate import score
from dsasr.evaluation.eval_sets import Recording, batch_recordings
from dsasr.evaluation.tuned import Tuned
from dsasr.inference.evaluated_model import EvaluatedModel
from dsasr.utils.distributed import device
from dsasr.utils.errors import UserError

WEIGHTS = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0)
FALSE_ALARMS = 0.01  # share of right transcripts that a threshold may doubt
BEAM = 8


@dataclass(frozen=True)
class Tuning:
    """``errors``: the error rate of each weight; ``right``: transcripts that the threshold was set
    on."""

    tuned: Tuned
    errors: dict[float, float]
    right: int


def tune(
    evaluated: EvaluatedModel,
    recordings: Sequence[Recording],
    *,
    beam: int = 0,
    rules: str = "standard",
    frames: int = 8000,
    progress: Callable[[Iterable], Iterable] = lambda items: items,
) -> Tuning:
    """Choose the weight with the fewest errors over the hypotheses of one beam search (of equal
    ones the lowest), and the margin below which `FALSE_ALARMS` of the right transcripts lie.

    Raises `UserError` for a model without a CTC head.
    """
    if evaluated.model.ctc is None or evaluated.model.speller is None:
        raise UserError(f"{evaluated.path} has no CTC head to tune the weight of")
    beam = max(2, beam or BEAM)
    cfg = replace(evaluated.decode, beam=beam, ctc_weight=0.0)
    nbest = nbest_of(evaluated, recordings, cfg, frames=frames, progress=progress)
    errors = {weight: error_rate(recordings, nbest, weight, rules) for weight in WEIGHTS}
    best = min(WEIGHTS, key=lambda weight: (errors[weight], weight))
    margins = []
    for r in recordings:
        chosen = choose(nbest[r.key], best) if r.text else None
        if chosen is None or chosen.ctc_score is None:
            continue
        if not score([(r.text, chosen.text, r.lang, r.key)], rules).counts.errors:
            margins.append(chosen.ctc_score.margin_per_unit)
    tuned = evaluated.tuned
    doubt = tuned.doubt
    if margins:
        margin = -float(np.quantile(margins, FALSE_ALARMS))
        doubt = replace(doubt, margin=round(max(0.0, margin), 3))
    return Tuning(Tuned(best, doubt), errors, len(margins))


def nbest_of(
    evaluated: EvaluatedModel,
    recordings: Sequence[Recording],
    cfg: DecodeConfig,
    *,
    frames: int = 8000,
    progress: Callable[[Iterable], Iterable] = lambda items: items,
) -> dict[str, list[Hypothesis]]:
    """The hypotheses of each recording by its key, as many as the beam is wide."""
    found: dict[str, list[Hypothesis]] = {}
    batches = list(
        batch_recordings(
            recordings, front_end=evaluated.front_end, tokenizer=evaluated.tokenizer, frames=frames
        )
    )
    for batch in progress(batches):
        lists = decode_nbest(
            evaluated.model,
            batch.to(device()),
            evaluated.tokenizer,
            cfg,
            nbest=cfg.beam,
            with_ctc_score=True,
        )
        found |= dict(zip(batch.keys, lists, strict=True))
    return found


def choose(hypotheses: Sequence[Hypothesis], weight: float) -> Hypothesis:
    """The best hypothesis by log-probability + ``weight`` · the head's; by its score where the
    weight is 0."""
    if not weight:
        return hypotheses[0]

    def value(hypothesis: Hypothesis) -> tuple[bool, float]:
        ctc = -math.inf if hypothesis.ctc_score is None else hypothesis.ctc_score.log_prob
        return hypothesis.finished, hypothesis.logprob + weight * ctc

    return max(hypotheses, key=value)


def error_rate(
    recordings: Sequence[Recording],
    nbest: dict[str, list[Hypothesis]],
    weight: float,
    rules: str = "standard",
) -> float:
    """The error rate over ``recordings`` with text, words and characters by language."""
    scores = score(
        ((r.text, choose(nbest[r.key], weight).text, r.lang, r.key) for r in recordings if r.text),
        rules,
    )
    return scores.counts.rate
