"""A run without a CTC head, and recordings for it."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from dsasr.analysis.probed_encoders import ProbedEncoder
from dsasr.data.audio.features import FbankConfig
from dsasr.data.audio.frontends import FbankFrontEnd
from dsasr.data.text.build_phonemizer import PhonemizerConfig, build_phonemizer
from dsasr.data.text.phoneme_vocab import PhonemeVocab
from dsasr.entropy_allocation.allocation_row import EncoderSource
from dsasr.evaluation.eval_sets import Recording


@pytest.fixture
def aligner() -> ProbedEncoder:
    """A run without a CTC head, whose frames are 40 ms."""
    data = SimpleNamespace(phonemizer=PhonemizerConfig(kind="stored"))
    build = SimpleNamespace(
        phonemes=PhonemeVocab.build([list("abcd")]),
        phonemizer=build_phonemizer(data.phonemizer),
        recipe=SimpleNamespace(data=data),
        front_end=FbankFrontEnd(FbankConfig()),
    )
    source = EncoderSource("x", "checkpoint")
    return ProbedEncoder(source, 0.04, lambda recordings: {}, builder=build)


@pytest.fixture
def recording():
    def build(key, text, **alignment) -> Recording:
        wave = np.zeros(6400, np.float32)
        return Recording(key, wave, text, "zh", key, alignment=alignment or None)

    return build


@pytest.fixture
def phonemes() -> list:
    """A stored alignment of 0.4 s."""
    return [["a", 0.0, 0.08], ["sil", 0.08, 0.16], ["b", 0.16, 0.24], ["c", 0.24, 0.4]]
