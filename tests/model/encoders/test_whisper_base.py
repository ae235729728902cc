"""Whisper base with its published weights."""

from __future__ import annotations

import pytest
import soundfile
import torch
from transformers import WhisperFeatureExtractor, WhisperModel

from dsasr.model.encoders.load import load_encoder
from dsasr.model.encoders.pretrained import RATE, PretrainedEncoderConfig


@pytest.fixture(params=["tones", "speech"])
def wave(request) -> torch.Tensor:
    """[n] at 16 kHz, less than 30 s."""
    if request.param == "speech":
        folder = request.getfixturevalue("recordings") / "en_read" / "audio" / "valid"
        samples, rate = soundfile.read(min(folder.glob("*.ogg")), dtype="float32")
        assert rate == RATE
        return torch.from_numpy(samples)
    time = torch.arange(4 * RATE) / RATE
    return 0.2 * torch.sin(2 * torch.pi * (200 + 300 * time) * time) * torch.sin(7 * time)


@pytest.mark.slow
def test_frames_of_30_seconds_are_those_of_transformers(whisper_base, wave):
    extractor = WhisperFeatureExtractor.from_pretrained(whisper_base)
    mels = extractor(wave.numpy(), sampling_rate=RATE, return_tensors="pt").input_features
    ours = load_encoder(whisper_base, PretrainedEncoderConfig(str(whisper_base))).eval()
    padded = torch.nn.functional.pad(wave, (0, 30 * RATE - len(wave)))
    features = ours.front_end.features(padded)[None]
    with torch.no_grad():
        theirs = WhisperModel.from_pretrained(whisper_base).encoder.eval()
        expected = theirs(mels).last_hidden_state
        found = ours(features, torch.tensor([3000])).frames_BSE
    rms = expected.square().mean().sqrt()
    assert found.shape == expected.shape == (1, 1500, 512) and rms > 0.5
    assert (found - expected).square().mean().sqrt() < 1e-3 * rms
