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

    def put(self, rows_N: Tensor, others: Prefixes) -> Prefixes:
        """These with ``others`` in the place of ``rows_N``."""
        return Prefixes(*(x.index_copy(0, rows_N, y) for x, y in zip(self, others, strict=True)))


def empty_prefixes(said: Posteriors, utterances_N: Tensor) -> Prefixes:
    """Nothing is written yet: only blanks have been."""
    blanks_NS = said.of(utterances_N, torch.full_like(utterances_N, BLANK))
    blank_NT = torch.nn.functional.pad(blanks_NS.cumsum(1), (1, 0))
    nothing_NT = torch.full_like(blank_NT, -math.inf)
    zeros_N = blank_NT.new_zeros(len(utterances_N))
    no_units_N = torch.full_like(utterances_N, BLANK)
    return Prefixes(utterances_N, no_units_N, nothing_NT, blank_NT, zeros_N)


def extended(said: Posteriors, prefixes: Prefixes, units_N: Tensor) -> Prefixes:
    """Each prefix with one more unit, none of them `BLANK`."""
    utterances_N, last_N, unit_NT, blank_NT, _ = prefixes
    # A unit equal to the last needs a blank between: else the frames write the one unit on.
    apart_N1 = (units_N == last_N).unsqueeze(1)
    before_NT = torch.logaddexp(blank_NT, unit_NT.masked_fill(apart_N1, -math.inf))
    emitted_NS, blanks_NS = (
        said.of(utterances_N, units) for units in (units_N, torch.full_like(units_N, BLANK))
    )
    new_unit_NT = _recurrence(before_NT, emitted_NS)
    new_blank_NT = _recurrence(new_unit_NT, blanks_NS)
    # The frame that begins the unit is one of the utterance's own.
    frames_S = torch.arange(emitted_NS.shape[1], device=units_N.device)
    own_NS = frames_S < said.lengths_B[utterances_N].unsqueeze(1)
    begun_NS = (before_NT[:, :-1] + emitted_NS).masked_fill(~own_NS, -math.inf)
    return Prefixes(utterances_N, units_N, new_unit_NT, new_blank_NT, begun_NS.logsumexp(1))


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


class JointScores:
    """The head's scores of a beam search's hypotheses.

    ``units_of(ids, utterance, ended)`` spells the tokens of a hypothesis in units (None: the head
    has no such unit, and the score is -inf); one that has not ended may end within a character. A
    token may write several units or none; what it adds is
    scored unit by unit from the state of the hypothesis that it continues. Where a token changes
    the units before it (a word is cut otherwise with its end), all are scored anew.
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
        """Of the hypotheses in ``rows``, each with a further token, the score in nats; of those
        that end with it the log-probability of the whole."""
        device = self.said.log_probs_BSP.device
        utterances = self._active.utterances_N.tolist()
        ids, units, ends, starts, tails = [], [], [], [], []
        for row, token in zip(rows, tokens, strict=True):
            before = self._units[row]
            ends.append(token == self.end_id)
            ids.append(self._ids[row] if ends[-1] else (*self._ids[row], token))
            found = self.units_of(ids[-1], utterances[row], ends[-1])
            units.append(found)
            goes_on = before is not None and found is not None and found[: len(before)] == before
            # A row of the active ones, or of the empty ones behind them.
            starts.append(row if goes_on or found is None else len(self._ids) + utterances[row])
            tails.append([] if found is None else found[len(before) if goes_on else 0 :])
        from_both = Prefixes(
            *(torch.cat(pair) for pair in zip(self._active, self._empty, strict=True))
        )
        prefixes = from_both.take(torch.tensor(starts, device=device))
        for place in range(max(map(len, tails), default=0)):
            longer = [number for number, tail in enumerate(tails) if len(tail) > place]
            rows_N = torch.tensor(longer, device=device)
            units_N = torch.tensor([tails[number][place] for number in longer], device=device)
            more = extended(self.said, prefixes.take(rows_N), units_N)
            prefixes = prefixes.put(rows_N, more)
        self._candidates = prefixes, ids, units
        ends_N = torch.tensor(ends, device=device)
        scores = torch.where(ends_N, totals(self.said, prefixes), prefixes.scores_N).tolist()
        return [-math.inf if u is None else s for s, u in zip(scores, units, strict=True)]

    def keep(self, candidates: Sequence[int]) -> None:
        """Go on with these of the last `score`, in this order."""
        prefixes, ids, units = self._candidates
        rows_N = torch.tensor(candidates, dtype=torch.int64, device=prefixes.last_N.device)
        self._active = prefixes.take(rows_N)
        self._ids = [ids[number] for number in candidates]
        self._units = [units[number] for number in candidates]
