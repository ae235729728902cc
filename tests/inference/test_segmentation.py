from __future__ import annotations

import io
from itertools import pairwise

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from dsasr.inference.segmentation import SegmentationConfig, pieces
from dsasr.utils.errors import UserError

RATE = 16000


def audio(wave: np.ndarray, rate: int = RATE, form: str = "WAV") -> io.BytesIO:
    buffer = io.BytesIO()
    soundfile.write(buffer, wave, rate, format=form)
    buffer.seek(0)
    return buffer


def speech(seconds: float, rate: int = RATE, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.1, int(seconds * rate)).astype(np.float32)


def hush(seconds: float, rate: int = RATE) -> np.ndarray:
    return np.random.default_rng(1).normal(0, 1e-5, int(seconds * rate)).astype(np.float32)


def spans(wave: np.ndarray, **given) -> list[tuple[float, float]]:
    found = list(pieces(audio(wave), SegmentationConfig(**given)))
    return [(round(p.start, 2), round(p.start + p.seconds, 2)) for p in found]


def test_pauses_end_pieces_and_silence_is_left_out():
    wave = np.concatenate([hush(3), speech(2), hush(1), speech(1.5), hush(0.3), speech(1), hush(2)])
    assert spans(wave) == [(2.8, 5.2), (5.8, 9.0)]


def test_without_a_pause_the_quietest_place_is_cut():
    wave = speech(25)
    wave[int(7.0 * RATE) : int(7.2 * RATE)] *= 0.3
    wave[int(14.0 * RATE) : int(14.3 * RATE)] *= 0.3
    found = spans(wave, max_seconds=10)
    assert found[0][0] == 0 and found[-1][1] == 25
    assert all(a[1] == b[0] for a, b in pairwise(found))
    assert all(b - a <= 10 for a, b in found)
    assert 7.0 < found[0][1] < 7.2 and 14.0 < found[1][1] < 14.3


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.booleans(), st.floats(0.02, 6)), min_size=1, max_size=6),
    st.sampled_from([8000, 16000, 44100]),
)
def test_all_speech_lies_in_some_piece_whatever_the_file(parts, rate):
    wave = np.concatenate([(speech if loud else hush)(s, rate) for loud, s in parts])
    found = list(pieces(audio(wave, rate), SegmentationConfig(max_seconds=5)))
    covered = np.zeros(len(wave), bool)
    before = 0.0
    for piece in found:
        assert piece.start >= before - 1e-3 and 0 < piece.seconds <= 5.01
        before = piece.start + piece.seconds
        low = int(piece.start * rate)
        covered[low : low + int((piece.seconds + 0.002) * rate)] = True
    at = 0
    for loud, seconds in parts:
        size = int(seconds * rate)
        if loud:
            missing = np.count_nonzero(~covered[at : at + size])
            assert missing <= 0.015 * rate, f"{missing / rate} s of speech lost"
        at += size


def test_silence_gives_nothing_and_formats_read_alike():
    assert spans(hush(9)) == [] and spans(np.zeros(1, np.float32)) == []
    wave = np.stack([speech(2, 44100), speech(2, 44100, seed=2)], axis=1)
    for form in ("FLAC", "OGG", "MP3"):
        (piece,) = pieces(audio(wave, 44100, form))
        assert abs(piece.seconds - 2) < 0.1 and piece.wave.dim() == 1


def test_what_is_no_audio_is_said():
    with pytest.raises(UserError, match="cannot be read as audio"):
        list(pieces(io.BytesIO(b"not audio at all")))
    with pytest.raises(UserError, match="/nowhere"):
        list(pieces("/nowhere/x.wav"))
    buffer = io.BytesIO()
    wave = speech(1)
    wave[5] = np.nan
    soundfile.write(buffer, wave, RATE, format="WAV", subtype="FLOAT")
    buffer.seek(0)
    with pytest.raises(UserError, match="not finite"):
        list(pieces(buffer))
    with pytest.raises(UserError, match="max_seconds"):
        SegmentationConfig(max_seconds=0.5)
