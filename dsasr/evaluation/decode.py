"""Transcripts from a `SpeechLLM`, batched, by greedy or beam search; phonemes from a `CtcModel`.

Under ZeRO-3 every forward pass gathers weights from all ranks, so that no rank may stop before the
others: `decode` asks ``any_rank`` before each step and, when its own utterances are done or it has
none, runs steps that count for nothing until nobody needs another.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from transformers import DynamicCache

from dsasr.data.batch import Batch
from dsasr.kernels import dispatch
from dsasr.model.ctc import greedy_phonemes
from dsasr.model.ctc_model import CtcModel
from dsasr.model.dynamic_chunks import Chunk
from dsasr.model.encoders.conformer import valid_frames
from dsasr.model.speech_llm import SpeechLLM, placeholder
from dsasr.utils.errors import UserError


@dataclass(frozen=True)
class DecodeConfig:
    """``beam`` 1 is greedy. An utterance may have ``tokens_per_second`` · its audio +
    ``extra_tokens``, at most ``max_tokens``; beams are ranked by log-probability / tokens **
    ``length_penalty``."""

    beam: int = 1  # beam width; 1: greedy
    max_tokens: int = 512  # tokens of a hypothesis, at most
    # a hypothesis has at most this many tokens per second of audio, plus extra_tokens
    tokens_per_second: float = 25.0
    extra_tokens: int = 16  # see tokens_per_second
    length_penalty: float = 1.0  # beams are ranked by log-probability / tokens ** length_penalty

    def __post_init__(self) -> None:
        if self.beam < 1 or self.max_tokens < 1:
            raise UserError("decoding: beam and max_tokens must be at least 1")
        if min(self.tokens_per_second, self.extra_tokens, self.length_penalty) < 0:
            raise UserError(
                "decoding: tokens_per_second, extra_tokens and length_penalty must not be negative"
            )

    def limit(self, seconds: float) -> int:
        """Tokens, the end included, that so much audio may give."""
        tokens = math.ceil(self.tokens_per_second * seconds) + self.extra_tokens
        return max(1, min(self.max_tokens, tokens))


@dataclass(frozen=True)
class Hypothesis:
    """``ids`` without the end token; ``logprob`` (nats) and ``token_entropies`` (nats, of the
    predictive distribution at each token) with it. ``finished`` is False if the limit cut it."""

    key: str
    ids: tuple[int, ...]
    text: str
    logprob: float
    token_entropies: tuple[float, ...]
    finished: bool = True


class Decodes(Protocol):
    """What `decode` needs of a tokenizer."""

    end_id: int

    def decode(self, ids: Sequence[int]) -> str: ...


@dataclass(frozen=True)
class _Beam:
    """A partial transcript: its last token, and the beam that it continues."""

    utterance: int
    logprob: float = 0.0
    length: int = 0
    token: int = -1
    entropy: float = 0.0
    parent: _Beam | None = None

    def path(self) -> list[_Beam]:
        beams, beam = [], self
        while beam.parent is not None:
            beams.append(beam)
            beam = beam.parent
        return beams[::-1]


class _Search:
    """The beams of a batch: pure bookkeeping, on the host."""

    def __init__(self, limits: Sequence[int], end_id: int, cfg: DecodeConfig):
        self.limits, self.end_id, self.cfg = limits, end_id, cfg
        self.active = [_Beam(utterance) for utterance in range(len(limits))]
        self.ended: list[list[_Beam]] = [[] for _ in limits]

    def score(self, beam: _Beam, length: int | None = None) -> float:
        return beam.logprob / (length or max(1, beam.length)) ** self.cfg.length_penalty

    def advance(self, logits_RV: Tensor) -> list[int]:
        """Extend the active beams by one token each; returns the row that each new one came from.

        Of an utterance's continuations, those that end among its best ``beam`` are set aside, and
        the best others go on. It is done when ``beam`` have ended, when no active one can still
        beat the best of them, or at its limit.
        """
        log_probs = logits_RV.log_softmax(-1)
        entropies = dispatch.softmax_entropy(logits_RV).tolist()
        wide = min(2 * self.cfg.beam, log_probs.shape[1])
        values, tokens = (found.tolist() for found in log_probs.topk(wide))
        found: dict[int, list[tuple[_Beam, int]]] = {}
        for row, beam in enumerate(self.active):
            for value, token in zip(values[row], tokens[row], strict=True):
                grown = _Beam(
                    beam.utterance,
                    beam.logprob + value,
                    beam.length + 1,
                    token,
                    entropies[row],
                    beam,
                )
                found.setdefault(beam.utterance, []).append((grown, row))
        self.active, rows = [], []
        for utterance, candidates in found.items():
            for beam, row in self._select(utterance, candidates):
                self.active.append(beam)
                rows.append(row)
        return rows

    def _select(
        self, utterance: int, candidates: list[tuple[_Beam, int]]
    ) -> list[tuple[_Beam, int]]:
        ended, limit, width = self.ended[utterance], self.limits[utterance], self.cfg.beam
        candidates.sort(key=lambda candidate: -candidate[0].logprob)
        going = []
        for rank, (beam, row) in enumerate(candidates):
            if beam.token != self.end_id:
                going.append((beam, row))
            elif rank < width:
                ended.append(beam)
            if len(going) == width:
                break
        if not going or len(ended) >= width:
            return []
        if going[0][0].length >= limit:
            ended.extend(beam for beam, _ in going)
            return []
        if ended:
            # A log-probability only falls, and the longest transcript divides it by most.
            hope = self.score(going[0][0], limit)
            if max(map(self.score, ended)) >= hope:
                return []
        return going

    def best(self, utterance: int) -> _Beam:
        """Among those that ended, else those that were cut, the best by score."""
        beams = self.ended[utterance]
        whole = [beam for beam in beams if beam.token == self.end_id]
        return max(whole or beams, key=self.score)


class _Stepper:
    """The language model behind the beams, with its key-value cache."""

    def __init__(self, model: SpeechLLM):
        self.model = model
        self.cache = DynamicCache(config=model.llm.config)

    def prefill(self, batch: Batch, chunk: Chunk | None) -> Tensor:
        """Read the prompts; logits [B, V] of the first token."""
        embeds_BLD, self.next_R = self.model.prompts(batch, chunk)
        length = embeds_BLD.shape[1]
        steps = torch.arange(length, device=embeds_BLD.device)
        self.mask_RL = (steps >= length - self.next_R.unsqueeze(1)).long()
        positions = (self.mask_RL.cumsum(1) - 1).clamp_min(0)
        return self._run(embeds_BLD, self.mask_RL, positions, self.cache)

    def step(self, tokens: Sequence[int], rows: Sequence[int]) -> Tensor:
        """Feed one token to each beam, which continues a row of the step before; logits [R, V]."""
        device = self.mask_RL.device
        if list(rows) != list(range(len(self.mask_RL))):
            index = torch.tensor(rows, device=device)
            self.cache.batch_select_indices(index)
            self.mask_RL, self.next_R = self.mask_RL[index], self.next_R[index]
        self.mask_RL = torch.cat((self.mask_RL, self.mask_RL.new_ones(len(rows), 1)), dim=1)
        embeds = self._embed(tokens)
        logits = self._run(embeds, self.mask_RL, self.next_R.unsqueeze(1), self.cache)
        self.next_R = self.next_R + 1
        return logits

    def idle(self) -> None:
        """The collectives of a step and nothing else."""
        self._run(self._embed([self.model.pad_id]), None, None, None)

    def _embed(self, tokens: Sequence[int]) -> Tensor:
        device = self.mask_RL.device
        return self.model.llm.get_input_embeddings()(torch.tensor(tokens, device=device)[:, None])

    def _run(
        self, embeds: Tensor, mask: Tensor | None, positions: Tensor | None, cache: object
    ) -> Tensor:
        output = self.model.llm.base_model(
            inputs_embeds=embeds,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=cache is not None,
        )
        head = self.model.head
        return head.cap(head(output.last_hidden_state[:, -1]))


@torch.no_grad()
def decode(
    model: SpeechLLM,
    batch: Batch,
    tokenizer: Decodes,
    cfg: DecodeConfig | None = None,
    any_rank: Callable[[bool], bool] = bool,
    chunk: Chunk | None = None,
) -> list[Hypothesis]:
    """Transcribe ``batch``, one `Hypothesis` an utterance, in eval mode; the result does not
    depend on what else is in the batch.

    ``any_rank(flag)`` is True if ``flag`` is on any rank, a collective that all ranks call as
    often; all must call `decode` equally often too, with an empty batch where they have no more.
    ``chunk`` simulates streaming in the encoder.
    """
    cfg = cfg or DecodeConfig()
    training = model.training
    model.eval()
    try:
        search = _Search([cfg.limit(s) for s in batch.durations], tokenizer.end_id, cfg)
        stepper = _Stepper(model)
        if len(batch):
            rows = search.advance(stepper.prefill(batch, chunk))
        else:
            rows = []
            stepper.prefill(placeholder(batch, model.encoder.cfg.mels, model.pad_id), chunk)
        while any_rank(bool(search.active)):
            if search.active:
                logits = stepper.step([beam.token for beam in search.active], rows)
                rows = search.advance(logits)
            else:
                stepper.idle()
    finally:
        model.train(training)
    return [_hypothesis(key, search.best(index), tokenizer) for index, key in enumerate(batch.keys)]


def _hypothesis(key: str, beam: _Beam, tokenizer: Decodes) -> Hypothesis:
    path, finished = beam.path(), beam.token == tokenizer.end_id
    ids = tuple(step.token for step in path)[: -1 if finished else None]
    return Hypothesis(
        key=key,
        ids=ids,
        text=tokenizer.decode(list(ids)),
        logprob=beam.logprob,
        token_entropies=tuple(step.entropy for step in path),
        finished=finished,
    )


@torch.no_grad()
def decode_phonemes(
    model: CtcModel, batch: Batch, symbols: Sequence[str], chunk: Chunk | None = None
) -> list[Hypothesis]:
    """The CTC head's best path: ``text`` is the phonemes' ``symbols``, ``logprob`` that of the
    path, and ``token_entropies`` are per encoder frame (40 ms)."""
    training = model.training
    model.eval()
    try:
        used = batch if len(batch) else placeholder(batch, model.encoder.cfg.mels, 0)
        output = model.encoder(used.features_BTF, used.feature_lengths_B, chunk)
        log_probs_BSP = model.ctc(output.frames_BSE)
    finally:
        model.train(training)
    valid_BS = valid_frames(output.lengths_B, log_probs_BSP.shape[1])
    path_BS = log_probs_BSP.amax(-1).masked_fill(~valid_BS, 0.0)
    entropy_BS = dispatch.softmax_entropy(log_probs_BSP)
    ids_B = greedy_phonemes(log_probs_BSP, output.lengths_B)
    return [
        Hypothesis(
            key=key,
            ids=tuple(ids_B[index]),
            text=" ".join(symbols[id_] for id_ in ids_B[index]),
            logprob=float(path_BS[index].sum()),
            token_entropies=tuple(entropy_BS[index][valid_BS[index]].tolist()),
        )
        for index, key in enumerate(batch.keys)
    ]
