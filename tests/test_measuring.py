"""Labels of a probe set from the shards' own alignments."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from dsasr import measuring
from dsasr.data.audio import FbankConfig
from dsasr.data.phonemes import PhonemeVocab, PhonemizerConfig
from dsasr.errors import UserError
from dsasr.evaluation.recordings import Recording


@pytest.fixture
def aligner():
    """A run without a CTC head, whose frames are 40 ms."""
    data = SimpleNamespace(phonemizer=PhonemizerConfig(kind="stored"), fbank=FbankConfig())
    build = SimpleNamespace(
        phonemes=PhonemeVocab.build([list("abcd")]), recipe=SimpleNamespace(data=data)
    )
    return measuring.Subject("x", {}, 0.04, lambda held: {}, build=build)


def recording(key, text, **alignment):
    wave = np.zeros(6400, np.float32)
    return Recording(key, wave, text, "zh", key, alignment=alignment or None)


PHONEMES = [["a", 0.0, 0.08], ["sil", 0.08, 0.16], ["b", 0.16, 0.24], ["c", 0.24, 0.4]]


def test_stored_alignments_need_no_ctc_head(aligner):
    # The alignment's words have two characters each; of the text alone, each character is a word.
    words = [["今天", 0.0, 0.16], ["天气", 0.16, 0.4]]
    turned = [["天气", 0.0, 0.16], ["今天", 0.16, 0.4]]
    held = [
        recording("u1", "今天天气", phonemes=PHONEMES, words=words),
        recording("u2", "天气今天", phonemes=PHONEMES, words=turned),
        recording("u3", "a bcd", phonemes=PHONEMES),
        recording("u4", "x", phonemes=[["z", 0.0, 0.1]]),
        recording("u5", "x", phonemes=[["a", 0.2, 0.1]]),
    ]
    found = measuring.probe_set(aligner, held)
    first, second, third = found.labels
    assert first.positions_S.tolist() == [0, 0, -1, -1, 1, 1, 2, 2, 2, 2]
    assert aligner.build.phonemes.decode(first.phonemes) == ["a", "b", "c"]
    assert first.words_S.tolist() == [0, 0, -1, -1, 1, 1, 1, 1, 1, 1]
    # The same spelling is the same word, in another utterance too.
    assert second.words_S.tolist() == [1, 1, -1, -1, 0, 0, 0, 0, 0, 0]
    # Without stored words, the text's: by their characters.
    assert len(set(third.words_S.tolist())) == 3
    assert found.causes == {"UnknownPhoneme": 1, "not_alignable": 1}


def test_without_a_head_or_an_alignment_it_is_refused(aligner):
    with pytest.raises(UserError, match="no CTC head"):
        measuring.probe_set(aligner, [recording(f"u{i}", "今天") for i in range(3)])
