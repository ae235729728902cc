"""Why a text may be wrong."""

import pytest

from dsasr.data.speech_statistics import SpeechStatistics, Utterance
from dsasr.evaluation.doubt import MEANING, DoubtConfig, find_doubt

SPEECH = SpeechStatistics.of(
    Utterance(2.0, 1.0, 0.0, "a" * count, 4, "en") for count in range(10, 21)
)


def doubt(text, seconds=1.0, finished=True, ctc_margin=0.0, **options):
    return find_doubt(
        text,
        seconds=seconds,
        finished=finished,
        ctc_margin=ctc_margin,
        speech=options.pop("speech", SPEECH),
        config=DoubtConfig(**options),
        lang="en",
    )


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (doubt("how are you today"), ()),
        (doubt("how are you today", finished=False), ("cut",)),
        (doubt("how are you today", seconds=0.2), ("too_long",)),
        (doubt("how are you today", seconds=9.0), ("too_short",)),
        (doubt("no no no no no"), ("loop",)),
        (doubt("i am sorry i can't", seconds=1.0), ("chat",)),
        (doubt("how are you today", ctc_margin=-2.0), ("unheard",)),
        (doubt("how are you today", ctc_margin=-2.0, margin=3.0), ()),
        (doubt("how are you today", ctc_margin=None), ()),
        (doubt("", seconds=9.0, finished=False, ctc_margin=-9.0), ()),
        (doubt("how are you today", seconds=0.2, speech=SpeechStatistics()), ()),
    ],
)
def test_each_kind(found, expected):
    assert found == expected and set(found) <= set(MEANING)


def test_a_word_or_two_is_not_measured_by_the_rate():
    assert doubt("oh", seconds=0.05) == ()
    assert doubt("yes", seconds=0.4) == ()
