"""Speech detectors: their frames, their state, and what they tell apart."""

import importlib.util

import numpy as np
import pytest
import torch

from dsasr.inference.vad import SPEECH, EnergyVad, SileroVad, build_vad

RATE = 16_000
silero = pytest.mark.skipif(
    importlib.util.find_spec("silero_vad") is None, reason="silero-vad is not installed"
)


def noise(seconds: float, level: float) -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.normal(0, level, int(seconds * RATE)).astype(np.float32)


@pytest.mark.parametrize("rate", [8000, 16_000, 44_100])
def test_a_frame_each_ten_milliseconds(rate):
    vad = EnergyVad(rate)
    for samples in (rate, 5 * (rate // 100), 0):
        assert len(vad.feed(np.zeros(samples, np.float32))) == -(-samples // (rate // 100))


def test_speech_without_a_pause_is_above_the_floor_of_what_came_before():
    vad = EnergyVad(RATE)
    assert not vad.feed(noise(5, 1e-3)).any()
    assert vad.feed(noise(5, 1e-2)).all()  # -40 dB, 20 above the floor
    assert not EnergyVad(RATE).feed(noise(5, 5e-3)).any()  # alone it may be the floor


def test_the_rule_stands_in_where_silero_is_missing(monkeypatch):
    monkeypatch.setattr("dsasr.inference.vad.has_silero", lambda: False)
    assert isinstance(build_vad("auto", RATE), EnergyVad)
    monkeypatch.setattr("dsasr.inference.vad.has_silero", lambda: True)
    assert isinstance(build_vad("energy", RATE), EnergyVad)


@silero
def test_silero_hears_no_speech_in_noise_and_leaves_torchs_threads():
    threads = torch.get_num_threads()
    vad = SileroVad(RATE)
    assert torch.get_num_threads() == threads
    assert (np.concatenate([vad.feed(noise(1, 0.1)) for _ in range(3)])[50:] < 0.5).all()


@silero
def test_two_files_at_once_have_states_of_their_own():
    wave = noise(2, 0.1) * np.sin(np.arange(2 * RATE) / 400).astype(np.float32)
    alone = SileroVad(RATE).feed(wave)
    first, second = SileroVad(RATE), SileroVad(RATE)
    second.feed(np.zeros(RATE, np.float32))
    half = RATE
    a = first.feed(wave[:half])
    second.feed(noise(1, 0.2))
    b = first.feed(wave[half:])
    assert np.abs(np.concatenate((a, b))[:95] - alone[:95]).max() < 1e-6


def test_clear_sound_is_speech_as_a_whole_where_silero_finds_some(monkeypatch):
    class Middle:
        """Speech in five windows of 32 ms, from the 40th on."""

        windows = 0

        def reset_states(self):
            self.windows = 0

        def __call__(self, window, rate):
            self.windows += 1
            return torch.tensor(0.9 if 40 <= self.windows < 45 else 0.1)

    monkeypatch.setattr("dsasr.inference.vad._load_silero", Middle)
    monkeypatch.setattr("dsasr.inference.vad._free", [])
    wave = noise(4, 1e-4)  # -80 dB
    wave[RATE : 2 * RATE] += noise(1, 0.1)
    wave[3 * RATE :] += noise(1, 0.1)  # in which silero finds none
    expected = np.zeros(400, bool)
    expected[100:200] = True
    assert np.array_equal(SileroVad(RATE).feed(wave) >= SPEECH, expected)
    vad = SileroVad(RATE)  # in blocks: speech from that on in which silero finds some (at 1.248 s)
    blocks = np.concatenate([vad.feed(wave[i : i + 1600]) for i in range(0, len(wave), 1600)])
    assert np.array_equal(np.flatnonzero(blocks >= SPEECH), np.arange(120, 200))
