"""Batched greedy or beam search decoding with a `SpeechLLM`.

Under ZeRO-3 every forward pass gathers weights from all ranks, so no rank may stop before the
others ("No rank alone"): `decode` calls ``any_rank`` before each step, and a rank whose utterances
are done, or that has none, runs idle steps until no rank needs another.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import torch
from torch import Tensor

from dsasr.data.batch import Batch
from dsasr.evaluation.beam_search import Beam, BeamSearch
from dsasr.evaluation.ctc_scoring import CtcScore
from dsasr.evaluation.detokenizer import Detokenizer
from dsasr.evaluation.hypothesis_scorer import HypothesisScorer
from dsasr.model.dynamic_chunks import Chunk, chunk_of
from dsasr.model.encoders.protocol import Encoder, silence_shape
from dsasr.model.llm_forward import Continuation, packed_hidden
from dsasr.model.speech_llm import SpeechLLM
from dsasr.utils import ranges
from dsasr.utils.errors import UserError
from dsasr.utils.ranges import NonNegativeFloat, NonNegativeInt, PositiveInt, Range


@dataclass(frozen=True)
class DecodeConfig:
    """Beam width (``beam`` 1 is greedy), token limit and length penalty.

    A transcript has at most ``tokens_per_second`` · seconds of audio + ``extra_tokens`` tokens, and
    never more than ``max_tokens``. Beams are ranked by log-probability / tokens **
    ``length_penalty``. A search ends when no open beam can beat the best that has ended, and the
    result never ranks below the greedy transcript. With a length penalty that may be as late as the
    token limit, where the model is uncertain: a lower ``tokens_per_second`` bounds the time.
    """

    beam: Annotated[int, Range(1, 1024)] = 1  # beam width; 1: greedy
    max_tokens: PositiveInt = 512  # tokens of a hypothesis, at most
    # a hypothesis has at most this many tokens per second of audio, plus extra_tokens
    tokens_per_second: NonNegativeFloat = 25.0
    extra_tokens: NonNegativeInt = 16  # see tokens_per_second
    # beams are ranked by log-probability / tokens ** length_penalty
    length_penalty: Annotated[float, Range(0, 10)] = 1.0
    # rank beams by log-probability + ctc_weight · that of their units by the CTC head (`dsasr
    # evaluate --tune` finds it); evaluations during training go without it unless the adaptor reads
    # CTC
    ctc_weight: NonNegativeFloat = 0.0
    # which beams the CTC head ranks: joint (at each token, by the probability that what the head
    # writes begins so: of heads that write characters or the language model's tokens), rescoring
    # (those that ended), or auto: joint where the head can
    ctc_scores: Literal["auto", "joint", "rescoring"] = "auto"
    # encode in chunks of so many milliseconds, as a live stream is; 0: whole utterances. Of an
    # encoder trained with dynamic chunks
    chunk_ms: NonNegativeInt = 0
    chunk_left: NonNegativeInt = 4  # chunks to the left that a chunk sees; with chunk_ms

    def __post_init__(self) -> None:
        ranges.check(self)
        if self.ctc_weight and self.beam == 1:
            raise UserError("decoding: ctc_weight needs a beam above 1")

    def for_model(self, model: SpeechLLM) -> DecodeConfig:
        """These settings without the weight of a CTC head that ``model`` lacks."""
        return self if model.ctc is not None else replace(self, ctc_weight=0.0)

    def check(self, model: SpeechLLM) -> None:
        """Raise `UserError` where these settings want scores that ``model``'s CTC head cannot give,
        or of which it has no head."""
        if self.ctc_weight and (model.ctc is None or model.speller is None):
            raise UserError("decoding: ctc_weight needs a model with its CTC head and its phonemes")
        self.is_joint(model)

    def is_joint(self, model: SpeechLLM) -> bool:
        """Whether the CTC head scores each token. Raises `UserError` where it is to and cannot."""
        can = model.speller is not None and model.speller.writes_text
        if self.ctc_weight and self.ctc_scores == "joint" and not can:
            raise UserError(
                "decoding: ctc_scores=joint needs a CTC head that writes characters or the "
                "language model's tokens: leave it out, or give rescoring"
            )
        return bool(self.ctc_weight) and can and self.ctc_scores != "rescoring"

    def token_limit(self, seconds: float) -> int:
        """The most tokens, the end token included, in the transcript of ``seconds`` of audio."""
        tokens = math.ceil(self.tokens_per_second * seconds) + self.extra_tokens
        return max(1, min(self.max_tokens, tokens))

    def chunk(self, encoder: Encoder) -> Chunk | None:
        """The chunk that utterances are encoded in; None: whole. Raises `UserError` for an encoder
        that takes none, and for a chunk that is no whole number of its frames."""
        if not self.chunk_ms:
            return None
        if not encoder.takes_chunks:
            raise UserError("the model's encoder sees whole utterances only: leave out the chunk")
        return chunk_of(self.chunk_ms / 1000, self.chunk_left, encoder.frame_seconds)


@dataclass(frozen=True)
class Hypothesis:
    """A transcript. ``ids`` are without the end token; ``logprob`` (nats) and ``token_entropies``
    (nats, of the predictive distribution at each token) include it. ``finished`` is False if the
    token limit cut the transcript. ``score`` is what hypotheses of an utterance are ranked by, and
    ``ctc_score`` the CTC head's scores of it (None: not computed, or it has none)."""

    key: str
    ids: tuple[int, ...]
    text: str
    logprob: float
    token_entropies: tuple[float, ...]
    finished: bool = True
    score: float = 0.0
    ctc_score: CtcScore | None = None

    @property
    def confidence(self) -> float:
        """The mean of exp(−H) over the tokens, H their entropies; 0 without tokens (**ours**)."""
        values = [math.exp(-entropy) for entropy in self.token_entropies]
        return sum(values) / max(len(values), 1)

    @property
    def heard(self) -> float | None:
        """The CTC head's `CtcScore.margin_per_unit`, to a thousandth; None without a score."""
        return None if self.ctc_score is None else round(self.ctc_score.margin_per_unit, 3)


class _Stepper:
    """The language model behind the beams."""

    def __init__(self, model: SpeechLLM):
        self.model = model
        self.continuation = Continuation(model.llm, model.cached)

    def prefill(self, batch: Batch, chunk: Chunk | None) -> Tensor:
        """Run the prompts through the model; logits [B, V] of the first token."""
        embeds_BLD, lengths_B, self.speech = self.model.prompts(batch, chunk)
        self.lengths_B = lengths_B
        self.device = embeds_BLD.device
        return self._logits(self.continuation.start(embeds_BLD, lengths_B))

    def step(self, tokens: Sequence[int], rows: Sequence[int]) -> Tensor:
        """Feed one token to each beam; ``rows`` are the rows of the previous step that the beams
        continue. Logits [R, V]."""
        return self._logits(self.continuation.step(self._embed(tokens), rows))

    def idle(self) -> None:
        """A forward pass for its collectives only."""
        hidden_11D = packed_hidden(self.model.llm, self._embed([self.model.pad_id])[None], None)
        self._logits(hidden_11D[:, -1])

    def _embed(self, tokens: Sequence[int]) -> Tensor:
        return self.model.embed_tokens(torch.tensor(tokens, device=self.device))

    def _logits(self, hidden_RD: Tensor) -> Tensor:
        head = self.model.head
        return head.cap(head(hidden_RD))


def decode(
    model: SpeechLLM,
    batch: Batch,
    tokenizer: Detokenizer,
    cfg: DecodeConfig | None = None,
    any_rank: Callable[[bool], bool] = bool,
    chunk: Chunk | None = None,
) -> list[Hypothesis]:
    """Transcribe ``batch`` in eval mode: one `Hypothesis` an utterance; see `decode_nbest`."""
    return [found[0] for found in decode_nbest(model, batch, tokenizer, cfg, any_rank, chunk)]


@torch.no_grad()
def decode_nbest(
    model: SpeechLLM,
    batch: Batch,
    tokenizer: Detokenizer,
    cfg: DecodeConfig | None = None,
    any_rank: Callable[[bool], bool] = bool,
    chunk: Chunk | None = None,
    nbest: int = 1,
    with_ctc_score: bool = False,
) -> list[list[Hypothesis]]:
    """Transcribe ``batch`` in eval mode: up to ``nbest`` hypotheses an utterance, the best first.

    A hypothesis does not depend on the other utterances of the batch. Of hypotheses with the same
    text the best is returned. ``with_ctc_score``: with the CTC head's scores of each
    (`Hypothesis.ctc_score`), if the model has one.

    Collective with several ranks: all must call `decode_nbest` equally often, with an empty batch
    where they have no more, and ``any_rank(flag)`` must return whether ``flag`` is True on any
    rank. ``chunk`` simulates streaming in the encoder (None: as ``cfg`` says).
    """
    cfg = cfg or DecodeConfig()
    cfg.check(model)
    chunk = chunk or cfg.chunk(model.encoder)
    training = model.training
    model.eval()
    try:
        stepper = _Stepper(model)
        spoken = batch.or_silence(silence_shape(model.encoder), model.pad_id)
        logits = stepper.prefill(spoken, chunk)
        speech = stepper.speech
        scorer = HypothesisScorer.of(
            model, speech.log_probs_BSP, speech.log_prob_lengths_B, batch.langs
        )
        # Of a learned table of positions the end is the end.
        rooms_B = (model.max_positions - stepper.lengths_B).clamp_min(1).tolist()
        limits = [cfg.token_limit(seconds) for seconds in batch.durations]
        limits = [min(x, room) for x, room in zip(limits, rooms_B, strict=False)]  # one if empty
        search = start_search(model, limits, tokenizer, cfg, scorer, nbest)
        rows = search.advance(logits) if len(batch) else []
        while any_rank(bool(search.active)):
            if search.active:
                logits = stepper.step([beam.token for beam in search.active], rows)
                rows = search.advance(logits)
            else:
                stepper.idle()
    finally:
        model.train(training)
    scorer = scorer if with_ctc_score else None
    return [hypotheses(search, row, tokenizer, key, scorer) for row, key in enumerate(batch.keys)]


def start_search(
    model: SpeechLLM,
    limits: Sequence[int],
    tokenizer: Detokenizer,
    cfg: DecodeConfig,
    scorer: HypothesisScorer | None,
    nbest: int = 1,
) -> BeamSearch:
    """A search that ranks as ``cfg`` says; ``scorer``: the CTC head's scores, None for a model
    without a head or a speller. Raises `UserError` where ``cfg`` wants scores that it cannot have.
    """
    cfg.check(model)

    def log_prob(beam: Beam) -> float:
        ids = [step.token for step in beam.path() if step.token != tokenizer.end_id]
        return scorer.log_prob(beam.utterance, tokenizer.decode(ids))

    joint = scorer.joint(tokenizer) if cfg.is_joint(model) else None
    return BeamSearch(limits, tokenizer.end_id, cfg, log_prob, nbest, joint)


def hypotheses(
    search: BeamSearch,
    row: int,
    tokenizer: Detokenizer,
    key: str = "",
    scorer: HypothesisScorer | None = None,
) -> list[Hypothesis]:
    """What ``search`` found of an utterance, the best first, each text once; with ``scorer``'s
    scores."""
    by_text: dict[str, Hypothesis] = {}
    for score, beam in search.results(row):
        hypothesis = _hypothesis(key, beam, tokenizer, score)
        by_text.setdefault(hypothesis.text, hypothesis)
    found = list(by_text.values())
    if scorer is None:
        return found
    return [replace(h, ctc_score=scorer.score(row, h.text)) for h in found]


def _hypothesis(key: str, beam: Beam, tokenizer: Detokenizer, score: float = 0.0) -> Hypothesis:
    path, finished = beam.path(), beam.token == tokenizer.end_id
    ids = tuple(step.token for step in path)[: -1 if finished else None]
    return Hypothesis(
        key=key,
        ids=ids,
        text=tokenizer.decode(list(ids)),
        logprob=beam.logprob,
        token_entropies=tuple(step.entropy for step in path),
        finished=finished,
        score=score,
    )
