"""What lies between speaker and file: the length stays, and the sound stays in its place."""

import numpy as np
import pytest
import soundfile
import torch

from dsasr.data.audio.channel import (
    CODECS,
    amplify,
    band_limit,
    pad_silence,
    through_codec,
)

RATE = 16_000


def voice(samples: int = 20_003) -> torch.Tensor:
    """A buzz with a slow envelope: a codec keeps it, and its place can be found."""
    times = torch.arange(samples) / RATE
    buzz = sum(torch.sin(2 * torch.pi * 150 * k * times) / k for k in range(1, 12))
    return 0.1 * buzz * (1 + torch.sin(2 * torch.pi * 3 * times**2))


@pytest.mark.parametrize("codec", CODECS)
def test_a_codec_keeps_length_and_place(codec):
    if not soundfile.check_format(*CODECS[codec][:2]):  # MP3 since libsndfile 1.1
        pytest.skip(f"this libsndfile has no {codec}")
    wave = voice()
    coded = through_codec(wave, codec)
    assert coded.shape == wave.shape and coded.dtype == torch.float32
    assert not torch.equal(coded, wave)
    spectrum = torch.fft.rfft(wave, 1 << 16).conj() * torch.fft.rfft(coded, 1 << 16)
    lag = int(torch.fft.irfft(spectrum).argmax())
    assert min(lag, (1 << 16) - lag) <= 40  # 2.5 ms
    assert torch.equal(through_codec(wave, codec), coded)
    assert len(through_codec(torch.zeros(0), codec)) == 0


def test_a_telephone_has_nothing_above_four_kilohertz():
    wave = 0.1 * torch.randn(RATE, generator=torch.Generator().manual_seed(0))
    narrow = band_limit(wave, 8000)
    power = torch.fft.rfft(narrow).abs().square()
    assert len(narrow) == len(wave)
    assert float(power[4500:].sum() / power.sum()) < 2e-3
    assert torch.equal(band_limit(wave, RATE), wave)


def test_silence_is_zero_or_a_devices():
    wave = voice()
    levels = []
    for seed in range(60):
        padded = pad_silence(wave, 0.25, 0.5, np.random.default_rng(seed))
        assert len(padded) == len(wave) + 4000 + 8000
        noise = padded[4000 : 4000 + len(wave)] - wave
        levels.append(float(padded[:4000].square().mean()) ** 0.5)
        assert float(noise.square().mean()) ** 0.5 == pytest.approx(levels[-1], rel=0.3, abs=1e-6)
    assert 18 < levels.count(0.0) < 42
    assert 2e-3 < max(levels) < 1.1e-2  # -40 dB


def test_level_in_decibels_and_nothing_clips():
    wave = voice()
    quiet = amplify(wave, -18.0)
    assert 20 * float(torch.log10(quiet.abs().max() / wave.abs().max())) == pytest.approx(-18)
    assert float(amplify(wave, 60.0).abs().max()) == pytest.approx(1.0)
    above = 1.5 * wave / wave.abs().max()
    assert torch.equal(amplify(above, 6.0), above)
