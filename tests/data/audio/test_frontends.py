"""Front ends of pretrained encoders, against transformers' own feature extractors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import (
    ParakeetFeatureExtractor,
    SeamlessM4TFeatureExtractor,
    Wav2Vec2FeatureExtractor,
    WhisperFeatureExtractor,
)

from dsasr.data.audio.decoding import decode
from dsasr.data.audio.frontends import PretrainedFrontEnd

SAMPLES = [1999, 16000, 16001, 41234, 79999]


def speech(samples: int, seed: int = 0) -> torch.Tensor:
    """Noise in bursts over a hum: spectra with peaks, silence and a wide range."""
    rng = np.random.default_rng(seed)
    time = np.arange(samples) / 16000
    wave = 0.2 * rng.standard_normal(samples) * (np.sin(2 * np.pi * 3 * time) > 0)
    wave += 0.1 * np.sin(2 * np.pi * 220 * time) + 1e-4 * rng.standard_normal(samples)
    return torch.from_numpy(wave.astype(np.float32)).clamp(-1, 1)


@pytest.mark.parametrize("bins", [80, 128])
@pytest.mark.parametrize("samples", [*SAMPLES, 479_950, 480_000])
def test_whisper(samples, bins):
    wave = speech(samples)
    extractor = WhisperFeatureExtractor(feature_size=bins)
    expected = extractor(wave.numpy(), sampling_rate=16000, return_tensors="pt")
    front = PretrainedFrontEnd("whisper", bins, max_seconds=30.0)
    features = front.features(wave)
    assert features.shape == (front.frames(samples), bins)
    theirs = expected["input_features"][0].T[: len(features)]
    torch.testing.assert_close(features, theirs, atol=1e-4, rtol=0)


def parakeet_in_float64(wave: torch.Tensor, extractor: ParakeetFeatureExtractor) -> torch.Tensor:
    """What `ParakeetFeatureExtractor` computes in float32: [T, F]."""
    window = torch.hann_window(extractor.win_length, periodic=False, dtype=torch.float64)
    wave = wave.double()
    wave = torch.cat((wave[:1], wave[1:] - extractor.preemphasis * wave[:-1]))
    spectrum = torch.stft(
        wave,
        extractor.n_fft,
        hop_length=extractor.hop_length,
        win_length=extractor.win_length,
        window=window.float().double(),
        return_complex=True,
        pad_mode="constant",
    )[:, : len(wave) // extractor.hop_length]
    energies = extractor.mel_filters.double() @ spectrum.abs().square()
    features = (energies + 2.0**-24).log().T
    std, mean = torch.std_mean(features, 0)
    return (features - mean) / (std + 1e-5)


@pytest.mark.parametrize("bins", [80, 128])
@pytest.mark.parametrize("samples", SAMPLES)
def test_parakeet(samples, bins):
    wave = speech(samples)
    extractor = ParakeetFeatureExtractor(feature_size=bins)
    theirs = extractor(wave.numpy(), sampling_rate=16000, return_tensors="pt")
    front = PretrainedFrontEnd("parakeet", bins)
    features = front.features(wave)
    count = int(theirs["attention_mask"].sum())
    assert features.shape == (count, bins) == (front.frames(samples), bins)
    exact = parakeet_in_float64(wave, extractor)
    torch.testing.assert_close(front.features(wave.double()), exact, atol=1e-5, rtol=0)
    # Both are float32: by the processor's FFT, either is off by up to 5e-4 in the quietest bins.
    torch.testing.assert_close(features, theirs["input_features"][0, :count], atol=1e-3, rtol=0)


@pytest.mark.parametrize("samples", SAMPLES)
def test_w2v_bert(samples):
    wave = speech(samples)
    expected = SeamlessM4TFeatureExtractor()(wave.numpy(), sampling_rate=16000, return_tensors="pt")
    front = PretrainedFrontEnd("w2v-bert", 160)
    features = front.features(wave)
    count = int(expected["attention_mask"].sum())
    assert features.shape == (count, 160) == (front.frames(samples), 160)
    theirs = expected["input_features"][0, :count].float()
    torch.testing.assert_close(features, theirs, atol=1e-4, rtol=0)


def test_w2v_bert_on_recordings(recordings):
    """Their quietest bins lie so far below the loudest that float32 would be off by up to 0.01."""
    extractor, front = SeamlessM4TFeatureExtractor(), PretrainedFrontEnd("w2v-bert", 160)
    for path in sorted((recordings / "en_read").rglob("*.ogg"))[::60]:
        wave = decode(path.read_bytes())
        features = front.features(wave)
        expected = extractor(wave.numpy(), sampling_rate=16000, return_tensors="pt")
        theirs = expected["input_features"][0, : len(features)].float()
        torch.testing.assert_close(features, theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("normalize", [True, False])
def test_wave(normalize):
    wave = speech(5000)
    extractor = Wav2Vec2FeatureExtractor(do_normalize=normalize)
    expected = extractor(wave.numpy(), sampling_rate=16000, return_tensors="pt")["input_values"]
    features = PretrainedFrontEnd("wave", 1, normalize=normalize).features(wave)
    assert features.shape == (5000, 1)
    torch.testing.assert_close(features[:, 0], expected[0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind,bins", [("whisper", 80), ("wave", 1), ("w2v-bert", 160)])
def test_a_batch_is_its_utterances(kind, bins):
    front = PretrainedFrontEnd(kind, bins)
    lengths = torch.tensor([16000, 5000, 9123])
    waves = torch.zeros(3, 16000)
    for row, length in zip(waves, lengths.tolist(), strict=True):
        row[:length] = speech(length, length)
    features, counts = front.batch(waves, lengths)
    for row, wave, length, count in zip(features, waves, lengths, counts, strict=True):
        assert torch.equal(row[:count], front.features(wave[:length]))
        assert not row[count:].any()


def test_memory_of_the_caller_is_used():
    front, wave = PretrainedFrontEnd("whisper", 80), speech(16000)
    memory = torch.full((120, 80), 7.0)
    features = front.features(wave, memory)
    assert features.data_ptr() == memory.data_ptr() and torch.equal(features, front.features(wave))
    assert (memory[100:] == 7).all()
