"""The probe's child process: synthetic batches, and which errors mean that memory ran out."""

from __future__ import annotations

import pytest
import torch

from dsasr.data.audio.features import FbankConfig
from dsasr.data.audio.frontends import FbankFrontEnd
from dsasr.planning.measure_batch import Shape, is_out_of_memory, synthetic_batch


def test_out_of_memory_is_distinguished_from_other_errors() -> None:
    with pytest.raises(RuntimeError) as huge:
        torch.empty(1 << 60)
    for error in (huge.value, MemoryError(), torch.OutOfMemoryError("CUDA out of memory")):
        assert is_out_of_memory(error)
    for error in (RuntimeError("shapes do not match"), ValueError("alloc"), KeyError("x")):
        assert not is_out_of_memory(error)


def test_synthetic_batches_are_what_a_model_takes() -> None:
    batch = synthetic_batch(Shape(3, 200, 7), FbankFrontEnd(FbankConfig()), phonemes=5, tokens=11)
    assert batch.features_BTF.shape == (3, 200, 80) and batch.tokens_BU.shape == (3, 7)
    assert batch.phonemes_BP.min() >= 1 and batch.phonemes_BP.max() < 5
    assert not (batch.phonemes_BP[:, 1:] == batch.phonemes_BP[:, :-1]).any()
    assert batch.phonemes_BP.shape[1] <= 200 // 4 // 2 + 40 and batch.tokens_BU.max() < 11
    assert len(batch) == 3 and batch.padding_share == 0 and batch.audio_seconds == 6.0
