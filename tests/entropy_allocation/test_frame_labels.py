"""Labels per frame, and features of other frame rates brought to the labels' grid."""

import pytest
import torch

from dsasr.entropy_allocation.forced_alignment import Alignment
from dsasr.entropy_allocation.frame_labels import (
    Numbering,
    frame_set,
    label,
    label_tokens,
    to_grid,
    word_owners,
)


class Letters:
    """A phonemizer whose phonemes are letters."""

    def phonemes(self, text, lang):
        return list(text)


def test_owners_by_pronunciation_and_by_share():
    assert word_owners(list("abcde"), "ab cde", "en", Letters()) == [0, 0, 1, 1, 1]
    assert word_owners(list("abcde"), "ab cde", "en", None) == [0, 0, 1, 1, 1]
    assert word_owners(["a"], "", "en", None) == [-1]


def placed():
    return Alignment(torch.tensor([1, 1, 0, 2, 3]), torch.tensor([0, 0, -1, 1, 2]), 0.0)


def test_words_and_tokens_per_frame():
    number = Numbering()
    held = label("k", "s", ["Ab", "c"], [1, 2, 3], [0, 0, 1], placed(), number, 0.04)
    assert held.words_S.tolist() == [0, 0, -1, 0, 1]
    assert number.ids == {"ab": 0, "c": 1}
    pieces = {5: "Ab", 6: " c"}
    tokens = label_tokens(
        held, "Ab c", [0, 0, 1], [5, 6], lambda ids: "".join(pieces[i] for i in ids)
    )
    assert tokens.words_S.tolist() == [5, 5, -1, 5, 6]


def test_grid_averages_finer_frames_and_repeats_coarser_ones():
    x = torch.arange(6.0)[:, None]
    assert to_grid(x, 0.02, 3, 0.04)[:, 0].tolist() == [0.5, 2.5, 4.5]
    assert to_grid(x[:2], 0.08, 4, 0.04)[:, 0].tolist() == [0.0, 0.0, 1.0, 1.0]
    assert to_grid(x, 0.04, 6, 0.04) is x
    with pytest.raises(ValueError):
        to_grid(x[:0], 0.02, 3, 0.04)


def test_silence_is_left_out_of_the_frame_set():
    held = label("k", "s", ["ab", "c"], [1, 2, 3], [0, 0, 1], placed(), Numbering(), 0.04)
    frames = frame_set([held], {"k": torch.arange(5.0)[:, None]}, 0.04, window=1)
    assert frames.x_NE[:, 0].tolist() == [0, 1, 3, 4]
    assert frames.phoneme_N.tolist() == [1, 1, 2, 3]
    assert frames.window_NK.tolist() == [[0, 1, 2], [0, 1, 2], [1, 2, 3], [2, 3, 0]]
