"""Decoding of prompts that the language model has read in parts: live streams."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dsasr.evaluation.decode import (
    DecodeConfig,
    Hypothesis,
    hypotheses,
    start_search,
)
from dsasr.evaluation.detokenizer import Detokenizer
from dsasr.evaluation.hypothesis_scorer import HypothesisScorer
from dsasr.model.llm_forward import Continuation, LlmPast
from dsasr.model.speech_llm import SpeechLLM


@torch.no_grad()
def decode_pasts(
    model: SpeechLLM,
    pasts: Sequence[LlmPast],
    endings: Sequence[Tensor],
    limits: Sequence[int],
    tokenizer: Detokenizer,
    cfg: DecodeConfig,
    scorer: HypothesisScorer | None = None,
) -> list[Hypothesis]:
    """Transcripts of prompts of which ``pasts`` have been read, and ``endings`` [n, D] not yet.

    An ending is the rest of the speech, the prompt's suffix and, where a transcript has to begin
    with given tokens, those tokens; a hypothesis is what follows, at most ``limits`` tokens of it.
    The pasts stay as they are. Keys of hypotheses are empty. With ``scorer`` they have its scores
    (`Hypothesis.ctc_score`). Raises `UserError` where ``cfg.ctc_weight`` is set without one.
    """
    continuation = Continuation(model.llm, model.cached)
    search = start_search(model, limits, tokenizer, cfg, scorer)
    hidden_RD = continuation.resume(pasts, endings)
    rows = search.advance(model.head.cap(model.head(hidden_RD)))
    while search.active:
        tokens = torch.tensor([beam.token for beam in search.active], device=hidden_RD.device)
        hidden_RD = continuation.step(model.embed_tokens(tokens), rows)
        rows = search.advance(model.head.cap(model.head(hidden_RD)))
    return [hypotheses(search, row, tokenizer, scorer=scorer)[0] for row in range(len(pasts))]
