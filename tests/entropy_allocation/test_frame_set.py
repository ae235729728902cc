"""Labeled frames: windows of phonemes, silence, and what is refused."""

import pytest
import torch

from dsasr.entropy_allocation.frame_set import FrameSetBuilder, phoneme_window


def test_window():
    positions = torch.tensor([0, 2, 3])
    assert phoneme_window(positions, [4, 5, 6, 7], 1).tolist() == [[0, 4, 5], [5, 6, 7], [6, 7, 0]]


def test_builder_leaves_silence_out():
    builder = FrameSetBuilder(1)
    positions = torch.tensor([-1, 0, 0, 1])
    builder.add(torch.arange(4.0)[:, None], positions, [3, 2], torch.tensor([-1, 8, -1, 8]), "x")
    data = builder.build()
    assert data.x_NE[:, 0].tolist() == [1, 3]
    assert data.window_NK.tolist() == [[0, 3, 2], [3, 2, 0]]
    assert data.word_N.tolist() == [8, 8]
    with pytest.raises(ValueError, match="4 frames"):
        builder.add(torch.zeros(4, 1), positions[:3], [3, 2], positions, "x")
    with pytest.raises(ValueError, match="no utterance"):
        FrameSetBuilder().build()
    with pytest.raises(ValueError, match="labeled"):
        data.with_features(torch.zeros(3, 2))
