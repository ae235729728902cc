"""Words with times."""

from __future__ import annotations

from dsasr.evaluation.ctc_scoring import AlignedSpan, CtcScore
from dsasr.inference.words import Stretch, Word

WORDS = (AlignedSpan("ba", 0, 8, 0.9), AlignedSpan("do", 10, 18, 0.123456))
PHONEMES = (AlignedSpan("b", 0, 4, 0.8), AlignedSpan("o", 15, 18, 0.7))


def test_frames_count_from_the_origin_and_no_word_is_in_the_silence():
    stretch = Stretch(origin=2.0, start=2.1, end=2.6, frame_seconds=0.04)
    words, phonemes = stretch.words("ba do", CtcScore(-1.0, 0.0, 4, WORDS, PHONEMES))
    assert words == (Word("ba", 2.1, 2.32, 0.9), Word("do", 2.4, 2.6, 0.1235))
    assert phonemes == (Word("b", 2.1, 2.16, 0.8), Word("o", 2.6, 2.6, 0.7))


def test_without_a_score_words_share_the_stretch_by_their_letters():
    stretch = Stretch(origin=0.0, start=1.0, end=2.0, frame_seconds=0.04)
    expected = (Word("a", 1.0, 1.2), Word("bcde", 1.2, 2.0))
    assert stretch.words("a bcde", None) == (expected, ())
    assert stretch.words("a bcde", CtcScore(-1.0, 0.0, 0)) == (expected, ())
    assert stretch.words("", None) == ((), ())
