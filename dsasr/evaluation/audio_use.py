"""Whether the loss depends on the audio: NLL with an utterance's own audio and with another's.

A speech LLM whose adaptor's output carries no information still lowers its loss, as a language
model of the transcripts. The loss alone does not show it; this does, as long as transcripts differ.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dsasr.data.batch import Batch
from dsasr.evaluation.mean_outputs import mean_outputs
from dsasr.model.speech_llm import SpeechLLM

BATCHES = 8  # of a rank that are tried
# Nats a token by which its own audio must lower an utterance's NLL (**ours**): a model that uses
# no audio gains under 0.003 on a thousand tokens, one that transcribes gains several nats.
LEAST_GAIN = 0.02


def audio_gain(
    model: SpeechLLM,
    batches: Sequence[Batch],
    *,
    device: torch.device,
    sum_ranks: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> float:
    """Mean NLL a token with the audio of another utterance of the batch, minus that with its own.

    In nats, over the first `BATCHES` batches; those of one utterance have no other and do not
    count. NaN where there are no others. Every rank must bring equally many batches.
    """
    own = [batch if len(batch) > 1 else _empty(batch) for batch in batches[:BATCHES]]
    others = [_with_other_audio(batch) for batch in own]
    (with_own,), (with_other,) = (
        mean_outputs(model, some, ("nll",), device=device, sum_ranks=sum_ranks)
        for some in (own, others)
    )
    return with_other - with_own


def _with_other_audio(batch: Batch) -> Batch:
    """Each utterance's labels with the audio of the one before it, the first's with the last's."""
    return dataclasses.replace(
        batch,
        features_BTF=batch.features_BTF.roll(1, 0),
        feature_lengths_B=batch.feature_lengths_B.roll(1, 0),
    )


def _empty(batch: Batch) -> Batch:
    """``batch`` without its utterances."""
    rows = ("features_BTF", "phonemes_BP", "tokens_BU", "feature_lengths_B", "phoneme_lengths_B",
            "token_lengths_B")  # fmt: skip
    names = (*rows, "keys", "shards", "texts", "langs", "speakers", "durations", "hints")
    return dataclasses.replace(batch, **{name: getattr(batch, name)[:0] for name in names})
