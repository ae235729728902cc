"""What a training's utterances were like."""

import numpy as np
import pytest

from dsasr import config
from dsasr.data.speech_statistics import (
    HAN,
    LEVELS,
    OTHER,
    SpeechStatistics,
    Utterance,
    characters,
    measure,
    script_of,
)


def test_quantiles_by_script():
    rows = [Utterance(2.0 + i / 100, 1.0, i / 1000, "ab cd", 4, "en") for i in range(101)]
    rows += [Utterance(1.0, 0.5, 0.0, "打球", 2, "zh"), Utterance(1.0, 0.0, 0.0, "x", 1, "en")]
    found = SpeechStatistics.of(rows)
    assert found.utterances == 102  # one has no sound
    assert found.rates("hello") == (4.0, 4.0) and found.rates("打") == (4.0, 4.0)
    assert found.quantile("seconds", 0.5) == pytest.approx(2.495, abs=0.01)
    assert found.quantile("pause", 0.999) == pytest.approx(0.1, abs=1e-3)
    assert found.quantile("tokens", 0.5) == pytest.approx(4 / 2.5, abs=0.01)
    assert len(found.seconds) == len(LEVELS)
    assert (found.language("hi"), found.language("你")) == ("en", "zh")
    assert config.build(SpeechStatistics, config.to_plain(found)) == found


def test_what_is_not_known():
    none = SpeechStatistics.of([])
    assert none == SpeechStatistics()
    assert none.quantile("seconds", 0.95) is None and none.rates("a") is None
    assert (none.language("你好"), none.language("hello"), none.language("")) == ("zh", "", "")
    rows = [Utterance(1, 1, 0, "ja", 1, "de"), Utterance(1, 1, 0, "yes", 1, "en")]
    two = SpeechStatistics.of(rows)
    assert two.language("ja") == ""


def test_script_and_characters():
    assert characters("ab  c d") == 4
    assert script_of("给 maria 发短信") == OTHER  # 4 Han characters of 9
    assert script_of("我喜欢 tv") == HAN


def test_one_utterance():
    rate = 16_000
    wave = np.zeros(2 * rate, np.float32)
    wave[rate // 2 : rate] = np.random.default_rng(0).normal(0, 0.1, rate // 2)
    found = measure(wave, rate, "ba", 3, "en")
    assert (found.seconds, found.tokens, found.lang) == (2.0, 3, "en")
    assert found.spoken == pytest.approx(0.5, abs=0.011)
