"""Decoding of prompts that the language model has read in parts: live streams."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from dsasr.evaluation.beam_search import BeamSearch
from dsasr.evaluation.decode import DecodeConfig, Detokenizer, Hypothesis, _hypothesis
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
) -> list[Hypothesis]:
    """Transcripts of prompts of which ``pasts`` have been read, and ``endings`` [n, D] not yet.

    An ending is the rest of the speech, the prompt's suffix and, where a transcript has to begin
    with given tokens, those tokens; a hypothesis is what follows, at most ``limits`` tokens of it.
    ``cfg.ctc_weight`` has no effect. The pasts stay as they are. Keys of hypotheses are empty.
    """
    continuation = Continuation(model.llm, model.cached)
    search = BeamSearch(limits, tokenizer.end_id, replace(cfg, ctc_weight=0.0))
    hidden_RD = continuation.resume(pasts, endings)
    rows = search.advance(model.head.cap(model.head(hidden_RD)))
    while search.active:
        tokens = torch.tensor([beam.token for beam in search.active], device=hidden_RD.device)
        hidden_RD = continuation.step(model.embed_tokens(tokens), rows)
        rows = search.advance(model.head.cap(model.head(hidden_RD)))
    return [_hypothesis("", search.best(row), tokenizer) for row in range(len(pasts))]
