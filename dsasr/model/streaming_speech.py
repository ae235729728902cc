"""Speech embeddings of utterances that are still going on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dsasr.model.speech_llm import SpeechLLM


@torch.no_grad()
def embed_frames(model: SpeechLLM, frames: Sequence[Tensor]) -> list[Tensor]:
    """The adaptor's embeddings [A, D] of each utterance's encoder frames [S, E] so far."""
    frames_BSE, lengths_B = _padded(frames)
    if model.adaptor.cfg.reads_ctc:
        log_probs_BSP, _ = ctc_log_probs(model, frames)
        frames_BSE, lengths_B = model.adaptor.read(log_probs_BSP, frames_BSE, lengths_B)
    embeds_BAD, counts_B = model.adaptor(frames_BSE, lengths_B)
    return [row[:count] for row, count in zip(embeds_BAD, counts_B.tolist(), strict=True)]


@torch.no_grad()
def ctc_log_probs(model: SpeechLLM, frames: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The CTC head's log-probabilities [B, S, P] of each utterance's encoder frames [S, E], and
    their lengths [B]."""
    frames_BSE, lengths_B = _padded(frames)
    return model.ctc(frames_BSE, lengths_B.to(frames_BSE.device)), lengths_B


def _padded(frames: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    lengths_B = torch.tensor([len(part) for part in frames])
    return pad_sequence(list(frames), batch_first=True), lengths_B


def settled_tokens(model: SpeechLLM, frames: int, tokens: int) -> int:
    """How many of the ``tokens`` of ``frames`` encoder frames no later frame will change.

    A token of stacked frames is settled when its stack is full (a convolution of the adaptor looks
    back only). A unit that CTC writes is settled when the next one has begun; with convolutions in
    the CTC head, which look ahead, none is.
    """
    cfg = model.adaptor.cfg
    if not cfg.reads_ctc:
        return frames // cfg.stack * (cfg.queries if cfg.kind == "qformer" else 1)
    if len(model.ctc.layers):
        return 0
    return max(tokens - 1, 0) if cfg.merge else tokens
