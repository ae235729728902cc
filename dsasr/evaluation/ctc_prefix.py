"""Joint CTC scores in a beam: the probability that what the head writes begins with a hypothesis.

For a head whose units are the transcript's characters or the language model's tokens, a hypothesis
is a prefix of units g, and its score is the log of the probability of all unit sequences that begin
with g, over all alignments (Watanabe et al. 2017, "Hybrid CTC/Attention Architecture for End-to-End
Speech Recognition"). It falls with each unit, and at the end of the transcript the log-probability
of exactly g takes its place.

Of a prefix are kept, for each number of frames t from 0 to S, the log-probabilities that those
frames have written it with a unit at their end, and with a blank. Both are linear recurrences in t,
solved by cumulative sums instead of a loop over frames, in float64 for the sums' sake.

Suffixes: N hypotheses in a batch, T = S + 1 numbers of frames.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dsasr.model.ctc import BLANK

LOWEST = -1e4  # of a log-posterior: sums over frames must stay finite


class Posteriors(NamedTuple):
    """What a head says of a batch: log-probabilities, padded, and frames of each utterance."""

    log_probs_BSP: Tensor
    lengths_B: Tensor  # on the device of the log-probabilities

    def of(self, utterances_N: Tensor, units_N: Tensor) -> Tensor:
        """Log-posteriors [N, S] of a unit in each of the utterances, float64."""
        return self.log_probs_BSP[utterances_N, :, units_N].double().clamp_min(LOWEST)


class Prefixes(NamedTuple):
    """N prefixes of units: their utterances and last units (`BLANK`: empty ones), their states
    after each number of frames, and their scores in nats."""

    utterances_N: Tensor
    last_N: Tensor
    unit_NT: Tensor  # the frames wrote the prefix, the last of them its last unit
    blank_NT: Tensor  # the same, but the last frame is a blank
    scores_N: Tensor

    def take(self, rows_N: Tensor) -> Prefixes:
        return Prefixes(*(x[rows_N] for x in self))


def empty_prefixes(said: Posteriors, utterances_N: Tensor) -> Prefixes:
    """An empty prefix for each utterance: its frames so far are all blank."""
    blanks_NS = said.of(utterances_N, torch.full_like(utterances_N, BLANK))
    blank_NT = torch.nn.functional.pad(blanks_NS.cumsum(1), (1, 0))
    nothing_NT = torch.full_like(blank_NT, -math.inf)
    zeros_N = blank_NT.new_zeros(len(utterances_N))
    no_units_N = torch.full_like(utterances_N, BLANK)
    return Prefixes(utterances_N, no_units_N, nothing_NT, blank_NT, zeros_N)


def extended(said: Posteriors, prefixes: Prefixes, units_N: Tensor) -> Prefixes:
    """Each prefix with one more unit, none of them `BLANK`."""
    before_NT, emitted_NS, scores_N = _begin(said, prefixes, units_N)
    blanks_NS = said.of(prefixes.utterances_N, torch.full_like(units_N, BLANK))
    unit_NT = _recurrence(before_NT, emitted_NS)
    blank_NT = _recurrence(unit_NT, blanks_NS)
    return Prefixes(prefixes.utterances_N, units_N, unit_NT, blank_NT, scores_N)


def extended_scores(said: Posteriors, prefixes: Prefixes, units_N: Tensor) -> Tensor:
    """The scores [N] of `extended`, at a fraction of its cost."""
    return _begin(said, prefixes, units_N)[2]


def _begin(said: Posteriors, prefixes: Prefixes, units_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of one more unit: what may stand before it [N, T], its posteriors [N, S], and the log of the
    probability that it begins at any frame [N]."""
    utterances_N, last_N, unit_NT, blank_NT, _ = prefixes
    # A unit equal to the last needs a blank between: else the frames write the one unit on.
    same_N1 = (units_N == last_N).unsqueeze(1)
    before_NT = torch.logaddexp(blank_NT, unit_NT.masked_fill(same_N1, -math.inf))
    emitted_NS = said.of(utterances_N, units_N)
    frames_S = torch.arange(emitted_NS.shape[1], device=units_N.device)
    own_NS = frames_S < said.lengths_B[utterances_N].unsqueeze(1)
    begun_NS = (before_NT[:, :-1] + emitted_NS).masked_fill(~own_NS, -math.inf)
    return before_NT, emitted_NS, begun_NS.logsumexp(1)


def totals(said: Posteriors, prefixes: Prefixes) -> Tensor:
    """The log-probability [N] of writing exactly each prefix, in nats."""
    ends_N1 = said.lengths_B[prefixes.utterances_N].unsqueeze(1)
    pair = (x.gather(1, ends_N1).squeeze(1) for x in (prefixes.unit_NT, prefixes.blank_NT))
    return torch.logaddexp(*pair)


def _recurrence(inflow_NT: Tensor, log_probs_NS: Tensor) -> Tensor:
    """x_0 = -inf; x_t = log(exp(x_{t-1}) + exp(inflow_{t-1})) + log_prob_t, for t from 1 to S."""
    sums_NS = log_probs_NS.cumsum(1)
    before_NS = torch.nn.functional.pad(sums_NS[:, :-1], (1, 0))
    states_NS = sums_NS + torch.logcumsumexp(inflow_NT[:, :-1] - before_NS, 1)
    return torch.nn.functional.pad(states_NS, (1, 0), value=-math.inf)


_Path = tuple[int, tuple[int, ...]]
"""A known prefix's row, and the units that follow it."""


class JointScores:
    """The head's scores of a beam search's hypotheses.

    ``units_of(ids, utterance, ended)`` spells the tokens of a hypothesis in units (None: the head
    has no such unit, and the score is -inf); one that has not ended may end within a character. A
    token may write several units or none; what it adds is scored unit by unit from the state of the
    hypothesis that it continues. Where a token changes the units before it (a word is cut otherwise
    with its end), all are scored anew.
    """

    def __init__(
        self,
        said: Posteriors,
        units_of: Callable[[Sequence[int], int, bool], list[int] | None],
        end_id: int,
    ):
        self.said, self.units_of, self.end_id = said, units_of, end_id
        device, count = said.log_probs_BSP.device, len(said.lengths_B)
        self._active = empty_prefixes(said, torch.arange(count, device=device))
        self._empty = self._active  # by utterance
        self._ids: list[tuple[int, ...]] = [()] * count
        self._units: list[list[int] | None] = [[]] * count

    def score(self, rows: Sequence[int], tokens: Sequence[int]) -> list[float]:
        """Scores in nats of the hypotheses in ``rows``, each with a further token of ``tokens``.

        Where that is the end token, the log-probability of the whole transcript.
        """
        utterances = self._active.utterances_N.tolist()
        ids, units, ends, paths = [], [], [], []
        for row, token in zip(rows, tokens, strict=True):
            before = self._units[row]
            ends.append(token == self.end_id)
            ids.append(self._ids[row] if ends[-1] else (*self._ids[row], token))
            found = self.units_of(ids[-1], utterances[row], ends[-1])
            units.append(found)
            goes_on = before is not None and found is not None and found[: len(before)] == before
            # From one of the active prefixes, or of the empty ones behind them.
            start = row if goes_on or found is None else len(self._ids) + utterances[row]
            tail = () if found is None else tuple(found[len(before) if goes_on else 0 :])
            paths.append((start, tail))
        self._grow(paths, ends)
        self._candidates = ids, units, paths
        scores = self._scores(paths, ends)
        return [-math.inf if u is None else s for s, u in zip(scores, units, strict=True)]

    def keep(self, candidates: Sequence[int]) -> None:
        """Go on with those candidates of the last `score`, by position and in this order."""
        ids, units, paths = self._candidates
        self._active = self._at([paths[number] for number in candidates])
        self._ids = [ids[number] for number in candidates]
        self._units = [units[number] for number in candidates]

    def _grow(self, paths: Sequence[_Path], ends: Sequence[bool]) -> None:
        """Compute the prefixes on the way to the last unit of each path, each of them once.

        The whole path's own prefix is computed in `_at`, if the hypothesis is kept; where
        ``ends`` is set it is computed here, for its total.
        """
        both = zip(self._active, self._empty, strict=True)
        self._grown = Prefixes(*(torch.cat(pair) for pair in both))
        self._places: dict[_Path, int] = {}
        depths = [len(tail) - (not end) for (_, tail), end in zip(paths, ends, strict=True)]
        for depth in range(1, max(depths, default=0) + 1):
            new = dict.fromkeys(
                (start, tail[:depth])
                for (start, tail), most in zip(paths, depths, strict=True)
                if depth <= most
            )
            more = self._at(list(new))
            first = len(self._grown.last_N)
            self._grown = Prefixes(
                *(torch.cat(pair) for pair in zip(self._grown, more, strict=True))
            )
            self._places |= {path: first + number for number, path in enumerate(new)}

    def _place(self, path: _Path) -> int:
        return self._places[path] if path[1] else path[0]

    def _tensor(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.said.log_probs_BSP.device)

    def _at(self, paths: Sequence[_Path]) -> Prefixes:
        """The prefixes at ``paths``, each of which is known at least up to its last unit."""
        known = [path for path in paths if not path[1] or path in self._places]
        last = [path for path in dict.fromkeys(paths) if path[1] and path not in self._places]
        prefixes = self._grown.take(self._tensor([self._place(path) for path in known]))
        if last:
            parents = self._grown.take(self._tensor([self._place((s, t[:-1])) for s, t in last]))
            more = extended(self.said, parents, self._tensor([t[-1] for _, t in last]))
            prefixes = Prefixes(*(torch.cat(pair) for pair in zip(prefixes, more, strict=True)))
        places = {path: number for number, path in enumerate([*known, *last])}
        return prefixes.take(self._tensor([places[path] for path in paths]))

    def _scores(self, paths: Sequence[_Path], ends: Sequence[bool]) -> list[float]:
        known = {path for path in paths if not path[1] or path in self._places}
        prefixes = self._grown.take(self._tensor([self._place(path) for path in known]))
        found = dict(zip(known, prefixes.scores_N.tolist(), strict=True))
        wholes = dict(zip(known, totals(self.said, prefixes).tolist(), strict=True))
        if last := [path for path in dict.fromkeys(paths) if path not in known]:
            parents = self._grown.take(self._tensor([self._place((s, t[:-1])) for s, t in last]))
            units_N = self._tensor([t[-1] for _, t in last])
            more = extended_scores(self.said, parents, units_N)
            found |= dict(zip(last, more.tolist(), strict=True))
        return [wholes[path] if end else found[path] for path, end in zip(paths, ends, strict=True)]
