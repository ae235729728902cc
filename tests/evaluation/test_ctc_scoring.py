"""What the CTC head says of a transcript, against posteriors whose answer is known."""

import itertools
import math

import pytest
import torch

from dsasr.data.text.lexicon import LexiconPhonemizer
from dsasr.data.text.phoneme_vocab import PhonemeVocab
from dsasr.data.text.speller import Speller
from dsasr.evaluation.ctc_scoring import AlignedSpan, log_prob_of, score_text, worst_stretch


@pytest.fixture
def speller(tmp_path) -> Speller:
    (tmp_path / "words").write_text("ba b a\ndo d o\ntomato t a o\ntomato(2) t o o\n")
    vocab = PhonemeVocab(["a", "b", "d", "o", "t"])
    return Speller(LexiconPhonemizer(tmp_path / "words"), vocab)


def posteriors(frames: str, sure: float = 0.9) -> torch.Tensor:
    """Log-probabilities [S, 6] that write ``frames``: a symbol a frame, - for blank."""
    ids = ["-abdot".index(c) for c in frames]
    probs = torch.full((len(ids), 6), (1 - sure) / 5, dtype=torch.float64)
    probs[torch.arange(len(ids)), ids] = sure
    return probs.log()


def summed(log_probs_SP: torch.Tensor, units: list[int]) -> float:
    """The probability of ``units``: over all paths that collapse to them."""
    total = 0.0
    for path in itertools.product(range(log_probs_SP.shape[1]), repeat=len(log_probs_SP)):
        kept = [p for i, p in enumerate(path) if p and (i == 0 or path[i - 1] != p)]
        if kept == units:
            total += math.exp(sum(float(log_probs_SP[i, p]) for i, p in enumerate(path)))
    return total


def test_pronunciations_are_summed(speller):
    log_probs_SP = torch.randn(5, 6, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    spellings = speller.pronunciations("tomato", "en")
    assert [speller.vocab.decode(s) for s in spellings] == [["t", "a", "o"], ["t", "o", "o"]]
    expected = sum(summed(log_probs_SP, s) for s in spellings)
    assert log_prob_of(log_probs_SP, spellings) == pytest.approx(math.log(expected), abs=1e-5)
    assert score_text(log_probs_SP, "tomato", "en", speller).log_prob == pytest.approx(
        math.log(expected), abs=1e-5
    )
    assert log_prob_of(log_probs_SP, []) == -math.inf
    assert log_prob_of(log_probs_SP[:2], spellings) == -math.inf


def test_words_are_where_they_were_heard(speller):
    score = score_text(posteriors("--b-a--------d-oo-"), "ba do", "en", speller)
    assert score.units == 4 and score.margin == pytest.approx(0.0, abs=1e-4)
    # Blanks beside a unit are its own, up to three frames; a gap is halved.
    assert [(w.text, w.start, w.end) for w in score.words] == [("ba", 0, 8), ("do", 10, 18)]
    assert all(w.confidence == pytest.approx(0.9, abs=1e-3) for w in score.words)
    spans = [(p.text, p.start, p.end) for p in score.phonemes]
    assert spans == [("b", 0, 4), ("a", 4, 8), ("d", 10, 15), ("o", 15, 18)]


def test_what_was_not_heard_is_far_below_what_was(speller):
    frames = posteriors("-b-a-d-o-")
    right, wrong = (score_text(frames, text, "en", speller) for text in ("ba do", "ba ba"))
    assert right.margin_per_unit > -0.01 and wrong.margin_per_unit < -1
    assert wrong.words[0].confidence > 0.8 > 0.2 > wrong.words[1].confidence


def test_where_it_cannot_say(speller):
    assert score_text(posteriors("-b-a-"), "unknown", "en", speller) is None
    assert score_text(posteriors("-b-a-"), "", "en", speller) is None
    assert score_text(posteriors("ba"), "ba do", "en", speller) is None  # fewer frames than units
    none = Speller(speller.phonemizer, PhonemeVocab(["x"]))
    assert score_text(posteriors("-b-a-"), "ba", "en", none) is None


def test_the_weakest_words_in_a_row():
    words = [AlignedSpan("", 0, 0, c) for c in (1.0, 0.2, 0.4, 0.9)]
    assert worst_stretch(words, 2) == pytest.approx(0.3)
    assert worst_stretch(words[:1], 3) == 1.0 and worst_stretch([]) == 1.0
