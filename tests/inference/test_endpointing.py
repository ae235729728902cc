"""Utterances in a stream, by a voice activity that the test dictates, and by energy."""

from __future__ import annotations

import numpy as np
import pytest

from dsasr.inference.endpointing import Endpointer
from dsasr.inference.segmentation import SegmentationConfig
from dsasr.inference.vad import EnergyVad

CONFIG = SegmentationConfig(max_seconds=3.0, pause_seconds=0.5, margin_seconds=0.2)


class Marked:
    """Speech is where samples are above 0."""

    def feed(self, wave: np.ndarray) -> np.ndarray:
        return wave.reshape(-1, 160).mean(axis=1) > 0


def marked(*seconds: float) -> np.ndarray:
    """Silence and speech in turn."""
    return np.concatenate([np.full(round(s * 16000), i % 2, np.float32)
                           for i, s in enumerate(seconds)])  # fmt: skip


def utterances(wave: np.ndarray, piece: int, activity=None) -> list[tuple[float, float]]:
    """(start, seconds) of each utterance, and the parts' order checked."""
    endpointer = Endpointer(CONFIG, activity or Marked())
    parts = [p for i in range(0, len(wave), piece) for p in endpointer.feed(wave[i : i + piece])]
    parts += endpointer.finish()
    found, going = [], False
    for part in parts:
        assert part.begins != going
        if part.begins:
            found.append([round(part.start, 3), 0])
        found[-1][1] += len(part.wave)
        going = not part.ends
    assert not going
    return [(start, round(samples / 16000, 3)) for start, samples in found]


@pytest.mark.parametrize("piece", [77, 160, 1600, 8000, 1_000_000])
def test_margins_pauses_and_the_longest_utterance(piece):
    wave = marked(1.0, 0.5, 0.3, 0.4, 0.7, 0.2, 0.6, 7.0, 1.0)
    expected = [
        (0.8, 1.6),  # a short pause goes on; 0.2 s on both sides
        (2.7, 0.6),
        (3.5, 3.0), (6.5, 3.0), (9.5, 1.4),
    ]  # fmt: skip
    assert utterances(wave, piece) == expected


def test_a_long_utterance_ends_at_a_short_pause():
    assert utterances(marked(0.0, 2.2, 0.2, 1.0), 1600) == [(0.0, 2.35), (2.35, 1.05)]


def test_speech_from_the_first_sample_to_the_last():
    assert utterances(marked(0.0, 0.4567), 1600) == [(0.0, 0.46)]
    assert utterances(marked(2.0), 1600) == []
    assert utterances(np.zeros(0, np.float32), 1600) == []


@pytest.mark.parametrize("offset", [0.0, 0.01])
@pytest.mark.parametrize("piece", [333, 16000])
def test_by_energy_the_pauses_of_speech_are_found(piece, offset):
    rng = np.random.default_rng(0)
    wave = rng.normal(0, 1, 16000 * 6).astype(np.float32) * 1e-4  # -80 dB
    for start in (1.0, 3.0):
        wave[int(start * 16000) :][:16000] *= 1000
    found = utterances(wave + np.float32(offset), piece, EnergyVad(16000))
    assert found == [(0.8, 1.4), (2.8, 1.4)]
