"""Beam search over a language model's logits: the beams of a batch, as plain values on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from dsasr.evaluation.ctc_prefix import JointScores
from dsasr.kernels import dispatch


class Ranking(Protocol):
    """The part of `DecodeConfig` that ranks beams."""

    @property
    def beam(self) -> int: ...
    @property
    def length_penalty(self) -> float: ...
    @property
    def ctc_weight(self) -> float: ...


@dataclass(frozen=True)
class Beam:
    """A partial transcript: its last token, and the beam that it continues. ``greedy``: each of its
    tokens is the most probable one; ``ctc``: its joint CTC score."""

    utterance: int
    logprob: float = 0.0
    length: int = 0
    token: int = -1
    entropy: float = 0.0
    parent: Beam | None = None
    greedy: bool = True
    ctc: float = 0.0

    def path(self) -> list[Beam]:
        beams, beam = [], self
        while beam.parent is not None:
            beams.append(beam)
            beam = beam.parent
        return beams[::-1]


class BeamSearch:
    """The beams of a batch, as plain Python values on the CPU.

    Where ``ctc_weight`` counts, ``ctc_log_prob`` gives the CTC head's log-probability of a beam,
    and ``joint`` scores each candidate as it grows; ``keep``: results of each utterance.

    The greedy transcript stays in the search for as long as it can win, beside the best ``beam``
    (**ours**): no result has a lower score than it. An open beam is dropped only where its best
    possible end cannot beat the best that has ended, so that it is never the number of ended beams
    that ends a search.
    """

    def __init__(
        self,
        limits: Sequence[int],
        end_id: int,
        cfg: Ranking,
        ctc_log_prob: Callable[[Beam], float] = lambda beam: 0.0,
        keep: int = 1,
        joint: JointScores | None = None,
    ):
        self.limits, self.end_id, self.cfg = limits, end_id, cfg
        self.ctc_log_prob = ctc_log_prob
        self.keep, self.joint = keep, joint
        self.active = [Beam(utterance) for utterance in range(len(limits))]
        # Per utterance the best of the beams that ended, and of those cut at the token limit, each
        # with its score, the best first; the log-probability decides between equal scores.
        self.ended: list[list[tuple[float, float, Beam]]] = [[] for _ in limits]
        self.cut: list[list[tuple[float, float, Beam]]] = [[] for _ in limits]

    def score(self, beam: Beam) -> float:
        """What beams are ranked by at their end."""
        if self.cfg.ctc_weight:
            joint = self.joint is not None and beam.token == self.end_id
            ctc = beam.ctc if joint else self.ctc_log_prob(beam)
            return beam.logprob + self.cfg.ctc_weight * ctc
        return beam.logprob / max(1, beam.length) ** self.cfg.length_penalty

    def rank(self, beam: Beam) -> float:
        """What open beams of a length are ranked by."""
        return beam.logprob + (self.cfg.ctc_weight * beam.ctc if self.joint is not None else 0.0)

    def bound(self, beam: Beam) -> float:
        """The highest `score` that a beam and its continuations can have.

        A log-probability only falls, and the longest transcript divides it by the most.
        """
        if self.cfg.ctc_weight:
            return self.rank(beam)
        return beam.logprob / self.limits[beam.utterance] ** self.cfg.length_penalty

    def advance(self, logits_RV: Tensor) -> list[int]:
        """Extend the active beams by one token each, from logits [R, V] with a row per beam.

        Returns the row that each new active beam continues. Of an utterance's continuations, those
        that end among its best ``beam`` are set aside, and the best others go on. The utterance is
        done when no active beam can still beat the best that ended, or at its token limit.
        """
        log_probs = logits_RV.log_softmax(-1)
        entropies = dispatch.softmax_entropy(logits_RV).tolist()
        width = min(2 * self.cfg.beam, log_probs.shape[1])
        values, tokens = (x.tolist() for x in log_probs.topk(width))
        count = len(self.active) * width
        sources = [row for row in range(len(self.active)) for _ in range(width)]
        chosen = [token for row in tokens for token in row]
        ctc = [0.0] * count if self.joint is None else self.joint.score(sources, chosen)
        extended: dict[int, list[tuple[Beam, int]]] = {}
        for number, row in enumerate(sources):
            beam, place = self.active[row], number % width
            longer = Beam(
                beam.utterance,
                beam.logprob + values[row][place],
                beam.length + 1,
                chosen[number],
                entropies[row],
                beam,
                beam.greedy and place == 0,
                ctc[number],
            )
            extended.setdefault(beam.utterance, []).append((longer, number))
        selected = [kept for group in extended.items() for kept in self._select(*group)]
        self.active = [beam for beam, _ in selected]
        if self.joint is not None:
            self.joint.keep([number for _, number in selected])
        return [sources[number] for _, number in selected]

    def _select(self, utterance: int, candidates: list[tuple[Beam, int]]) -> list[tuple[Beam, int]]:
        """Those that go on, of beams and their numbers."""
        candidates.sort(key=lambda c: (self.rank(c[0]), c[0].logprob), reverse=True)
        if self.cfg.beam == 1:
            candidates = candidates[:1]
        active: list[tuple[Beam, int]] = []
        for position, (beam, number) in enumerate(candidates):
            if beam.token == self.end_id:
                # Of a joint search each end has its final score: the best of all may win.
                if position < self.cfg.beam or beam.greedy or self.joint is not None:
                    self._add(self.ended[utterance], beam)
            elif len(active) < self.cfg.beam or beam.greedy:
                active.append((beam, number))
        if active and active[0][0].length >= self.limits[utterance]:
            for beam, _ in () if self.ended[utterance] else active:
                self._add(self.cut[utterance], beam)
            return []
        if len(self.ended[utterance]) == self.keep:
            least = self.ended[utterance][-1][0]
            active = [candidate for candidate in active if self.bound(candidate[0]) > least]
        return active

    def _add(self, best: list[tuple[float, float, Beam]], beam: Beam) -> None:
        """Put ``beam`` among the ``best``, if it belongs there."""
        if len(best) == self.keep and self.bound(beam) < best[-1][0]:
            return  # without asking the CTC head
        scored = self.score(beam), beam.logprob, beam
        better = sum(other[:2] >= scored[:2] for other in best)
        best.insert(better, scored)
        del best[self.keep :]

    def best(self, utterance: int) -> Beam:
        """The best of `results`."""
        return self.results(utterance)[0][1]

    def results(self, utterance: int) -> list[tuple[float, Beam]]:
        """The best that ended with their scores, else the best of those cut at the token limit."""
        found = self.ended[utterance] or self.cut[utterance]
        return [(score, beam) for score, _, beam in found]
