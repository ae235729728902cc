"""Which frames hold sound."""

import numpy as np
import pytest

from dsasr.data.audio.activity import frame_power, runs, spoken_part

RATE = 16_000


def noise(seconds: float, level: float, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.normal(0, level, int(seconds * RATE)).astype(np.float32)


def test_power_of_frames_without_offset():
    wave = 0.1 * np.sin(2 * np.pi * 500 * np.arange(RATE + 77) / RATE) + 0.25
    power = frame_power(wave, RATE)
    assert len(power) == 101
    assert power[1:100] == pytest.approx(0.005, rel=0.03)
    assert len(frame_power(np.zeros(0), RATE)) == 0 and len(frame_power(np.zeros(3), RATE)) == 1


def test_offset_and_hum_are_taken_off():
    times = np.arange(RATE) / RATE
    assert frame_power(np.full(RATE, 0.25), RATE).max() < 1e-12
    hum = np.sin(2 * np.pi * 50 * times)
    assert 10 * np.log10(frame_power(hum, RATE)[2:-2].max() / 0.5) < -13
    # A click moves nothing beyond the 3 ms beside it.
    click = np.zeros(RATE)
    click[8000:8016] = 0.5
    assert np.count_nonzero(frame_power(click, RATE) > 1e-9) <= 2


def test_runs():
    assert runs(np.array([0, 1, 1, 0, 1], bool)) == [(1, 3), (4, 5)]
    assert runs(np.zeros(0, bool)) == [] and runs(np.ones(2, bool)) == [(0, 2)]


@pytest.mark.parametrize("offset", [0.0, 0.01])
@pytest.mark.parametrize("floor", [1e-5, 1e-3])
def test_what_is_spoken_and_the_longest_pause_in_it(offset, floor):
    parts = [(0.3, floor), (1.0, 0.1), (0.2, floor), (0.5, 0.1), (0.4, floor)]
    wave = np.concatenate([noise(s, level, i) for i, (s, level) in enumerate(parts)]) + offset
    assert spoken_part(wave, RATE) == pytest.approx((0.3, 2.0, 0.2), abs=0.011)
    assert spoken_part(noise(2.0, 1e-5), RATE) == (0.0, 0.0, 0.0)


def test_loud_sound_without_a_pause_is_all_active():
    start, end, pause = spoken_part(noise(3.0, 0.1), RATE)
    assert (start, end) == pytest.approx((0.0, 3.0), abs=0.011) and pause == 0
    # The hiss of a quiet recorder is as steady, and no sound.
    assert spoken_part(noise(3.0, 2e-3), RATE) == (0.0, 0.0, 0.0)
