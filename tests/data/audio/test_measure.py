"""Level, clipping and the estimate of the signal-to-noise ratio, of signals with known values."""

from __future__ import annotations

import pytest
import torch

from dsasr.data.audio.measure import CLIPPED, measure_audio

RATE = 16_000
TIMES = torch.arange(2 * RATE) / RATE


def test_the_level_of_a_tone():
    wave = 0.5 * torch.sin(2 * torch.pi * 440 * TIMES)
    found = measure_audio(wave, RATE)
    assert found.level == pytest.approx(-9.03, abs=0.01)  # 20·log10(0.5 / √2)
    assert found.clipped == 0 and found.snr == pytest.approx(0, abs=0.2)


@pytest.mark.parametrize("ratio", [10.0, 30.0])
def test_the_ratio_of_speech_with_pauses_to_its_noise(ratio):
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(len(TIMES), generator=generator)
    speech = torch.randn(len(TIMES), generator=generator) * 10 ** (ratio / 20)
    speech *= (TIMES * 4).long() % 2  # quarters of a second, on and off
    expected = 10 * torch.log10(torch.tensor(10 ** (ratio / 10) + 1)).item()
    found = measure_audio(0.01 * (speech + noise) / 10 ** (ratio / 20), RATE)
    assert found.snr == pytest.approx(expected, abs=2.0)


def test_clipping_counts_samples_at_full_scale():
    wave = torch.sin(2 * torch.pi * 440 * TIMES)
    clipped = (2 * wave).clamp(-1, 1)
    # |2 sin x| is above 0.985 where x is more than 0.515 from a zero.
    assert measure_audio(clipped, RATE).clipped == pytest.approx(1 - 2 * 0.515 / torch.pi, abs=0.01)
    assert measure_audio(0.9 * wave, RATE).clipped == 0 < CLIPPED


@pytest.mark.parametrize("samples", [1, 5, 319, 321])
def test_short_audio_and_silence(samples):
    found = measure_audio(torch.zeros(samples), RATE)
    assert (found.level, found.clipped, found.snr) == (-100.0, 0.0, 0.0)
