"""A held-out set through a model: transcripts with their error rates, or phoneme error rate.

Collective in spirit but not in imports: what ranks must agree on comes in as callables.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from dsasr.data.batch import Batch
from dsasr.evaluation.decode import DecodeConfig, Decodes, decode
from dsasr.evaluation.error_rate import Scores
from dsasr.model.ctc_model import CtcModel
from dsasr.model.speech_llm import SpeechLLM


@dataclass(frozen=True)
class Transcript:
    """One utterance's reference and hypothesis."""

    key: str
    lang: str
    reference: str
    hypothesis: str
    seconds: float
    entropy: float  # mean predictive entropy of its tokens, nats
    finished: bool  # False: cut off at the token limit


@dataclass
class Transcripts:
    """Transcripts of a set in key order, and their scores."""

    rows: list[Transcript] = field(default_factory=list)

    def scores(self, rules: str = "standard") -> Scores:
        """Error rates over the utterances with a reference, by the rules of `normalize`."""
        scores = Scores(rules=rules)
        for row in self.rows:
            if row.reference:
                scores.add(row.reference, row.hypothesis, row.lang, row.key)
        return scores


def transcribe(
    model: SpeechLLM,
    batches: Iterable[Batch],
    tokenizer: Decodes,
    config: DecodeConfig,
    *,
    device: torch.device,
    any_rank: Callable[[bool], bool] = bool,
    gather: Callable[[Any], list[Any]] = lambda value: [value],
) -> Transcripts:
    """Decode ``batches`` (this rank's) and return all ranks' transcripts, on every rank.

    Every rank must bring equally many batches; one without utterances keeps step.
    """
    rows: list[Transcript] = []
    for batch in batches:
        found = decode(model, batch.to(device), tokenizer, config, any_rank)
        for i, hypothesis in enumerate(found):
            entropies = hypothesis.token_entropies
            rows.append(
                Transcript(
                    key=batch.keys[i],
                    lang=batch.langs[i],
                    reference=batch.texts[i],
                    hypothesis=hypothesis.text,
                    seconds=batch.durations[i],
                    entropy=sum(entropies) / max(len(entropies), 1),
                    finished=hypothesis.finished,
                )
            )
    merged = [row for held in gather(rows) for row in held]
    return Transcripts(sorted(merged, key=lambda row: row.key))


@torch.no_grad()
def phoneme_error_rate(
    model: CtcModel,
    batches: Iterable[Batch],
    *,
    device: torch.device,
    sum_ranks: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor,
) -> float:
    """Edits over reference phonemes of the CTC head's best path, over all ranks."""
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    for batch in batches:
        errors, count = model(batch.to(device)).sums["phoneme_errors"]
        sums += torch.stack([errors, count]).to(sums)
    errors, count = sum_ranks(sums).tolist()
    return errors / count if count else float("nan")
