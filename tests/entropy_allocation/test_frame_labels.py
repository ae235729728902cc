"""Labels per frame, and features of other frame rates resampled to the labels' grid."""

import json

import pytest
import torch

from dsasr.data.text.phoneme_vocab import PhonemeVocab
from dsasr.entropy_allocation.frame_labels import (
    AlignedUtterance,
    UtteranceLabels,
    align_utterance,
    assign_words,
    frame_set,
    label_tokens,
    number_words,
    to_grid,
)


class Letters:
    """A phonemizer whose phonemes are letters."""

    def phonemes(self, text, lang):
        return list(text)


def test_words_by_pronunciation_and_by_characters():
    assert assign_words(list("abcde"), "ab cde", "en", Letters()) == [0, 0, 1, 1, 1]
    assert assign_words(list("abcde"), "ab cde", "en", None) == [0, 0, 1, 1, 1]
    assert assign_words(["a"], "", "en", None) == [-1]
    # The words of an utterance in upper case are pronounced as those in lower case.
    assert assign_words(list("abcde"), "A BCDE", "en", Letters()) == [0, 1, 1, 1, 1]
    assert assign_words(list("USa"), "US a", "en", Letters()) == [0, 0, 1]


def aligned(words=("Ab", "c"), key="k") -> AlignedUtterance:
    positions_S = torch.tensor([0, 0, -1, 1, 2])
    return AlignedUtterance(key, "s", (1, 2, 3), positions_S, tuple(words), (0, 0, 1))


def test_an_utterance_is_aligned_with_its_words():
    vocab = PhonemeVocab.build([list("abc")])
    ids = vocab.encode("abc")
    logits = torch.zeros(5, 4)
    logits[torch.arange(5), torch.tensor([ids[0], ids[0], 0, ids[1], ids[2]])] = 9.0
    utterance = ("k", "s", "Ab c", "en", ids)
    aligned_now = align_utterance(*utterance, logits.log_softmax(-1), vocab, Letters())
    assert aligned_now.positions_S.tolist() == [0, 0, 0, 1, 2]
    assert (aligned_now.words, aligned_now.phoneme_words) == (("Ab", "c"), (0, 0, 1))
    with pytest.raises(ValueError, match="too few"):
        align_utterance(*utterance, logits[:2].log_softmax(-1), vocab, Letters())


def test_words_and_tokens_per_frame():
    labels, second = number_words([aligned(), aligned(("C", "d"))], 0.04)
    assert labels.words_S.tolist() == [0, 0, -1, 0, 1]
    # One spelling is one word, in another utterance too, whatever its case.
    assert second.words_S.tolist() == [1, 1, -1, 1, 2]
    pieces = {5: "Ab", 6: " c"}
    tokens = label_tokens(
        labels, "Ab c", [0, 0, 1], [5, 6], lambda ids: "".join(pieces[i] for i in ids)
    )
    assert tokens.words_S.tolist() == [5, 5, -1, 5, 6]


def test_labels_survive_json():
    [labels] = number_words([aligned()], 0.04)
    again = UtteranceLabels.from_json(json.loads(json.dumps(labels.to_json())))
    assert again.to_json() == labels.to_json() and again.phonemes == (1, 2, 3)
    assert torch.equal(again.words_S, labels.words_S)


def test_grid_averages_finer_frames_and_repeats_coarser_ones():
    x = torch.arange(6.0)[:, None]
    assert to_grid(x, 0.02, 3, 0.04)[:, 0].tolist() == [0.5, 2.5, 4.5]
    assert to_grid(x[:2], 0.08, 4, 0.04)[:, 0].tolist() == [0.0, 0.0, 1.0, 1.0]
    assert to_grid(x, 0.04, 6, 0.04) is x
    with pytest.raises(ValueError):
        to_grid(x[:0], 0.02, 3, 0.04)


def test_silence_is_left_out_of_the_frame_set():
    frames = frame_set(
        number_words([aligned()], 0.04), {"k": torch.arange(5.0)[:, None]}, 0.04, window=1
    )
    assert frames.x_NE[:, 0].tolist() == [0, 1, 3, 4]
    assert frames.phoneme_N.tolist() == [1, 1, 2, 3]
    assert frames.window_NK.tolist() == [[0, 1, 2], [0, 1, 2], [1, 2, 3], [2, 3, 0]]
