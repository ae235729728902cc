"""Prefix scores against all alignments of tiny posteriors, one by one and in a beam."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from dsasr.evaluation.beam_search import BeamSearch
from dsasr.evaluation.ctc_prefix import (
    JointScores,
    Posteriors,
    Prefixes,
    empty_prefixes,
    extended,
    extended_scores,
    totals,
)
from dsasr.evaluation.decode import DecodeConfig
from dsasr.model.ctc import BLANK, ctc_log_prob

END = 4


def posteriors(*frames: int, units: int = 3, seed: int = 0) -> Posteriors:
    """Of random utterances; what lies beyond their frames is other random posteriors."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(
        len(frames), max(frames), units, generator=generator, dtype=torch.float64
    )
    return Posteriors(logits.log_softmax(-1), torch.tensor(frames))


def alignments(log_probs_SP: torch.Tensor) -> dict[tuple[int, ...], float]:
    """Each sequence of units that S frames can write → its probability, path by path."""
    found: dict[tuple[int, ...], float] = {}
    frames, units = log_probs_SP.shape
    for path in itertools.product(range(units), repeat=frames):
        written = tuple(unit for unit, _ in itertools.groupby(path) if unit != BLANK)
        prob = math.exp(sum(float(log_probs_SP[t, unit]) for t, unit in enumerate(path)))
        found[written] = found.get(written, 0.0) + prob
    return found


def log(value: float) -> float:
    return math.log(value) if value > 0 else -math.inf


def by_force(found: dict[tuple[int, ...], float], units: tuple[int, ...]) -> float:
    """The log-probability of all sequences that begin with ``units``."""
    return log(sum(p for written, p in found.items() if written[: len(units)] == units))


def scored(said: Posteriors, utterance: int, units: tuple[int, ...]) -> tuple[float, float]:
    """(score as a prefix, log-probability of the whole)."""
    prefixes = empty_prefixes(said, torch.tensor([utterance]))
    for unit in units:
        prefixes = extended(said, prefixes, torch.tensor([unit]))
    return float(prefixes.scores_N), float(totals(said, prefixes))


@pytest.mark.parametrize("frames", [1, 2, 5])
def test_scores_are_the_sums_over_all_alignments(frames):
    said = posteriors(frames, seed=frames)
    found = alignments(said.log_probs_BSP[0])
    assert sum(found.values()) == pytest.approx(1)
    for length in range(5):
        for units in itertools.product((1, 2), repeat=length):
            prefix, whole = scored(said, 0, units)
            assert prefix == pytest.approx(by_force(found, units), abs=1e-10)
            assert whole == pytest.approx(log(found.get(units, 0.0)), abs=1e-10)


def test_many_prefixes_of_padded_utterances_are_scored_as_one_by_one():
    said = posteriors(5, 1, 3, seed=7)
    sequences = [(), (1,), (2, 2), (1, 2, 1), (2, 1)]
    rows = [(b, units) for b in range(3) for units in sequences]
    prefixes = empty_prefixes(said, torch.tensor([b for b, _ in rows]))
    for place in range(3):
        longer = [i for i, (_, units) in enumerate(rows) if len(units) > place]
        index = torch.tensor(longer)
        units_N = torch.tensor([rows[i][1][place] for i in longer])
        more = extended(said, prefixes.take(index), units_N)
        pairs = zip(prefixes, more, strict=True)
        assert torch.equal(extended_scores(said, prefixes.take(index), units_N), more.scores_N)
        prefixes = Prefixes(*(x.index_copy(0, index, y) for x, y in pairs))
    wholes = totals(said, prefixes)
    for number, (b, units) in enumerate(rows):
        frames = int(said.lengths_B[b])
        alone = Posteriors(said.log_probs_BSP[b : b + 1, :frames], torch.tensor([frames]))
        prefix, whole = scored(alone, 0, units)
        assert float(prefixes.scores_N[number]) == pytest.approx(prefix, abs=1e-12)
        assert float(wholes[number]) == pytest.approx(whole, abs=1e-12)


def test_a_long_utterance_in_float32_agrees_with_torchs_loss():
    generator = torch.Generator().manual_seed(3)
    log_probs = (3 * torch.randn(1500, 40, generator=generator)).log_softmax(-1)
    said = Posteriors(log_probs[None], torch.tensor([1500]))
    units = tuple(torch.randint(1, 40, (60,), generator=generator).tolist())
    before = 0.0
    for length in range(1, 61):
        prefix, whole = scored(said, 0, units[:length])
        assert whole <= prefix <= before + 1e-9
        before = prefix
    assert whole == pytest.approx(ctc_log_prob(log_probs.double(), units), rel=1e-9)


def spelled(ids, row=0, ended=False) -> list[int] | None:
    """Token 0 writes nothing, 1 and 2 a unit, 3 two; 5 none that the head knows; 6 after 1
    changes the unit before it, and after 2 begins one that lacks its end."""
    units: list[int] = []
    if ended and tuple(ids[-2:]) == (2, 6):
        return None
    for token in ids:
        if token == 5:
            return None
        if token == 6 and units and units[-1] == 1:
            units[-1] = 2
        units += {0: [], 1: [1], 2: [2], 3: [2, 1], 6: []}[token]
    return units


def test_tokens_of_several_units_of_none_and_of_other_units_than_before():
    said = posteriors(5, 4, seed=2)
    found = [alignments(said.log_probs_BSP[b, :n]) for b, n in enumerate((5, 4))]
    joint = JointScores(said, spelled, END)
    hypotheses = {0: (0, ()), 1: (1, ())}
    for kept in ([(0, 3), (0, 1), (1, 1), (1, 0)], [(0, 2), (1, 6), (2, 1), (2, 5), (3, 3)],
                 [(0, 6), (1, 3), (2, 6), (3, 1), (4, 1)], [(0, 1)]):  # fmt: skip
        every = [(row, token) for row in hypotheses for token in (0, 1, 2, 3, END, 5, 6)]
        scores = joint.score([row for row, _ in every], [token for _, token in every])
        for (row, token), score in zip(every, scores, strict=True):
            utterance, ids = hypotheses[row]
            units = spelled(ids if token == END else (*ids, token), ended=token == END)
            expected = -math.inf
            if units is not None and token == END:
                expected = log(found[utterance].get(tuple(units), 0.0))
            elif units is not None:
                expected = by_force(found[utterance], tuple(units))
            assert score == pytest.approx(expected, abs=1e-10), (ids, token)
        joint.keep([every.index(pair) for pair in kept])
        hypotheses = {
            number: (hypotheses[row][0], (*hypotheses[row][1], token))
            for number, (row, token) in enumerate(kept)
        }


class Table:
    """A language model of random next-token logits, one row per prefix, over 0 to `END`."""

    def __init__(self, seed: int):
        self.seed = seed

    def log_probs(self, ids) -> torch.Tensor:
        generator = torch.Generator().manual_seed(hash((self.seed, tuple(ids))) % 2**31)
        return torch.randn(5, generator=generator, dtype=torch.float64).log_softmax(-1)


def searched(table: Table, said: Posteriors, cfg: DecodeConfig, limit: int, keep: int = 1):
    joint = JointScores(said, spelled, END)
    search = BeamSearch([limit], END, cfg, keep=keep, joint=joint)
    while search.active:
        prefixes = [[step.token for step in beam.path()] for beam in search.active]
        search.advance(torch.stack([table.log_probs(ids) for ids in prefixes]))
    return [(score, tuple(s.token for s in beam.path())) for score, beam in search.results(0)]


def slow_beam(table: Table, found, weight: float, width: int, limit: int):
    """The search written again, with scores by force: (score, ids) of the best that ended, None
    where all are cut at the limit."""
    active, ended = [((), 0.0, True)], []
    for length in range(1, limit + 1):
        candidates = []
        for ids, logprob, greedy in active:
            row = table.log_probs(ids)
            order = row.argsort(descending=True)[: 2 * width].tolist()
            for token in order:
                units = tuple(spelled(ids if token == END else (*ids, token)))
                heard = log(found.get(units, 0.0)) if token == END else by_force(found, units)
                total = logprob + float(row[token])
                first = greedy and token == order[0]
                candidates.append((total + weight * heard, total, (*ids, token), first))
        candidates.sort(reverse=True)
        active = []
        for score, logprob, ids, greedy in candidates:
            if ids[-1] == END:
                ended.append((score, ids))
            elif len(active) < width or greedy:
                active.append((score, ids, logprob, greedy))
        best = max(ended, default=(-math.inf, ()))
        active = [] if length == limit else [a for a in active if a[0] > best[0]]
        active = [(ids, logprob, greedy) for _, ids, logprob, greedy in active]
    return max(ended, default=None)


@pytest.mark.parametrize("width", [2, 3])
def test_a_beam_with_joint_scores_is_that_of_a_slow_search(width):
    weight, differs, compared = 0.7, 0, 0
    for seed in range(25):
        table, said = Table(seed), posteriors(4, seed=seed)
        found = alignments(said.log_probs_BSP[0])
        (best,) = searched(table, said, DecodeConfig(beam=width, ctc_weight=weight), 6)
        expected = slow_beam(table, found, weight, width, 6)
        if expected is None:
            assert END not in best[1]
            continue
        assert best[1] == expected[1] and best[0] == pytest.approx(expected[0], abs=1e-9)
        (alone,) = searched(table, said, DecodeConfig(beam=width, ctc_weight=1e-9), 6)
        differs += alone[1] != best[1]
        compared += 1
    assert compared > 15 and differs > 3


def test_a_wide_beam_finds_the_best_of_all_transcripts():
    weight = 1.3
    for seed in range(5):
        table, said = Table(seed), posteriors(4, seed=seed + 50)
        found = alignments(said.log_probs_BSP[0])
        every = []
        for length in range(4):
            for ids in itertools.product(range(END), repeat=length):
                path = (*ids, END)
                logprob = sum(float(table.log_probs(path[:i])[t]) for i, t in enumerate(path))
                heard = log(found.get(tuple(spelled(ids)), 0.0))
                every.append((logprob + weight * heard, path))
        best = sorted(every, reverse=True)[:4]
        cfg = DecodeConfig(beam=300, ctc_weight=weight)
        results = searched(table, said, cfg, 4, keep=4)
        assert [ids for _, ids in results] == [ids for _, ids in best]
        assert [s for s, _ in results] == pytest.approx([s for s, _ in best], abs=1e-9)
