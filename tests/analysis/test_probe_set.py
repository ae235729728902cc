"""Labels of a probe set, from the shards' own alignments."""

from __future__ import annotations

import pytest

from dsasr.analysis.probe_set import label_recordings
from dsasr.utils.errors import UserError


def test_stored_alignments_need_no_ctc_head(aligner, recording, phonemes):
    # The alignment's words have two characters each; of the text alone, each character is a word.
    words = [["今天", 0.0, 0.16], ["天气", 0.16, 0.4]]
    reversed_words = [["天气", 0.0, 0.16], ["今天", 0.16, 0.4]]
    recordings = [
        recording("u1", "今天天气", phonemes=phonemes, words=words),
        recording("u2", "天气今天", phonemes=phonemes, words=reversed_words),
        recording("u3", "a bcd", phonemes=phonemes),
        recording("u4", "x", phonemes=[["z", 0.0, 0.1]]),
        recording("u5", "x", phonemes=[["a", 0.2, 0.1]]),
    ]
    labeled = label_recordings(aligner, recordings)
    first, second, third = labeled.labels
    assert first.positions_S.tolist() == [0, 0, -1, -1, 1, 1, 2, 2, 2, 2]
    assert aligner.builder.phonemes.decode(first.phonemes) == ["a", "b", "c"]
    assert first.words_S.tolist() == [0, 0, -1, -1, 1, 1, 1, 1, 1, 1]
    # The same spelling is the same word, in another utterance too.
    assert second.words_S.tolist() == [1, 1, -1, -1, 0, 0, 0, 0, 0, 0]
    # Without stored words, those of the text: by their characters.
    assert len(set(third.words_S.tolist())) == 3
    assert labeled.causes == {"UnknownPhoneme": 1, "not_alignable": 1}


def test_without_a_head_or_an_alignment_it_is_refused(aligner, recording):
    with pytest.raises(UserError, match="no CTC head"):
        label_recordings(aligner, [recording(f"u{i}", "今天") for i in range(3)])


def test_recordings_without_text_or_with_a_repeated_key_are_counted(aligner, recording, phonemes):
    recordings = [recording(f"u{i % 4}", "今天", phonemes=phonemes) for i in range(5)]
    labeled = label_recordings(aligner, [*recordings, recording("u9", "")])
    assert [r.key for r in labeled.recordings] == [x.key for x in labeled.labels]
    assert len(labeled.labels) == 4 and labeled.causes == {"same_key": 1, "no_text": 1}
    with pytest.raises(UserError, match=r"only 2 utterances.*same_key.*at least 3"):
        label_recordings(aligner, [recordings[0], recordings[1], recordings[0]])
