"""Noise and tones stand for speech here: the energy rule hears them, silero-vad would not."""

import pytest


@pytest.fixture(autouse=True)
def energy_rule(monkeypatch):
    monkeypatch.setattr("dsasr.inference.vad.has_silero", lambda: False)
