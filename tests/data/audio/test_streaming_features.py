"""Features of audio in pieces are those of the whole audio."""

from __future__ import annotations

import pytest
import torch

from dsasr.data.audio.features import Cmvn, FbankConfig
from dsasr.data.audio.frontends import FbankFrontEnd
from dsasr.data.audio.streaming_features import StreamingFbank


@pytest.mark.parametrize("piece", [1, 159, 160, 401, 10_240, 50_000])
@pytest.mark.parametrize("samples", [0, 399, 400, 561, 16_001])
def test_pieces_give_the_frames_of_the_whole(samples, piece):
    if piece == 1:
        samples = min(samples, 600)
    generator = torch.Generator().manual_seed(samples)
    wave = 0.1 * torch.randn(samples, generator=generator)
    cmvn = Cmvn(torch.linspace(5, 9, 80), torch.linspace(1, 2, 80))
    front_end = FbankFrontEnd(FbankConfig(), cmvn)
    stream = StreamingFbank(front_end)
    parts = torch.cat([stream.feed(part) for part in wave.split(piece)] or [torch.zeros(0, 80)])
    whole = front_end.features(wave)
    assert parts.shape == whole.shape
    torch.testing.assert_close(parts, whole, atol=2e-4, rtol=0)
