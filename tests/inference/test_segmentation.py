from __future__ import annotations

import io

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from dsasr.data.speech_statistics import SpeechStatistics
from dsasr.inference.segmentation import SegmentationConfig, split_audio
from dsasr.utils.errors import UserError

RATE = 16000


def audio(wave: np.ndarray, rate: int = RATE, form: str = "WAV") -> io.BytesIO:
    buffer = io.BytesIO()
    soundfile.write(buffer, wave, rate, format=form)
    buffer.seek(0)
    return buffer


def speech(seconds: float, rate: int = RATE, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.1, int(seconds * rate)).astype(np.float32)


def silence(seconds: float, rate: int = RATE) -> np.ndarray:
    return np.random.default_rng(1).normal(0, 1e-5, int(seconds * rate)).astype(np.float32)


def spans(wave: np.ndarray, **options) -> list[tuple[float, float]]:
    """(start, end) of each segment in seconds."""
    segments = split_audio(audio(wave), SegmentationConfig(**options))
    return [(round(s.start, 2), round(s.start + s.seconds, 2)) for s in segments]


def test_pauses_end_segments_and_silence_is_left_out():
    wave = np.concatenate(
        [silence(3), speech(2), silence(1), speech(1.5), silence(0.3), speech(1), silence(2)]
    )
    assert spans(wave) == [(2.8, 5.2), (5.8, 9.0)]


def test_long_speech_is_cut_at_its_longest_short_pause():
    wave = speech(25)
    for start, end in ((3.0, 3.3), (7.0, 7.2), (8.0, 8.07), (14.0, 14.3)):
        wave[int(start * RATE) : int(end * RATE)] *= 1e-3
    segments = spans(wave, max_seconds=10)
    assert segments[0][0] == 0 and segments[-1][1] == 25
    assert all(b - a <= 10 for a, b in segments)
    assert 7.0 < segments[0][1] < 7.2 and 14.0 < segments[1][1] < 14.3


def test_without_any_pause_pieces_overlap():
    config = SegmentationConfig(max_seconds=10, overlap_seconds=2)
    segments = list(split_audio(audio(speech(25)), config))
    found = [(round(s.start, 2), round(s.start + s.seconds, 2), s.overlap) for s in segments]
    assert found == [(0, 10, 0), (8, 18, 2), (16, 25, 2)]


@pytest.mark.parametrize("kind", ["offset", "hum", "noise"])
def test_pauses_are_found_beside_a_steady_sound(kind):
    wave = np.concatenate([speech(2), silence(0.8), speech(2), silence(0.8), speech(2)])
    times = np.arange(len(wave)) / RATE
    steady = {
        "offset": np.full(len(wave), 0.01),
        "hum": 10 ** (-50 / 20) * np.sqrt(2) * np.sin(2 * np.pi * 50 * times),
        "noise": np.random.default_rng(5).normal(0, 0.1 * 10 ** (-30 / 20), len(wave)),
    }[kind]
    found = spans((wave + steady).astype(np.float32), vad="energy")
    assert np.array(found) == pytest.approx(np.array([(0, 2.2), (2.6, 5), (5.4, 7.6)]), abs=0.015)


def test_clicks_are_no_speech():
    wave = silence(60)
    rng = np.random.default_rng(0)
    for at in range(1, 59, 2):
        size = int(rng.uniform(0.001, 0.05) * RATE)
        wave[at * RATE : at * RATE + size] += speech(size / RATE, seed=at)[:size]
    assert spans(wave, vad="energy") == []


def test_pieces_are_like_the_utterances_of_the_training():
    seconds, pause = (1.0, 1.2, 2.0, 3.0, 3.2, 3.5), (0.0, 0.0, 0.05, 0.1, 0.15, 0.2)
    config = SegmentationConfig.trained_with(SpeechStatistics(9, seconds, pause), 30.0)
    assert (config.max_seconds, config.whole_seconds, config.pause_seconds) == (3.0, 3.9, 0.15)
    assert SegmentationConfig.trained_with(SpeechStatistics(), 12.0).max_seconds == 12.0
    wave = np.concatenate([speech(1.4), silence(0.17), speech(1.4), silence(0.13), speech(1.0)])
    found = [round(s.start + s.seconds, 2) for s in split_audio(audio(wave), config)]
    assert found == [1.57, 3.04, 4.1]
    # A pause that is not quite as long counts where both sides are as long as an utterance.
    wave = np.concatenate([speech(0.7), silence(0.13), speech(1.7)])
    assert len(list(split_audio(audio(wave), config))) == 1


def test_what_is_shorter_than_any_utterance_is_no_piece():
    cut = {"max_seconds": 3.0, "pause_seconds": 0.15, "margin_seconds": 0.05, "vad": "energy"}
    short, long, later = speech(0.6), speech(1.2, seed=1), speech(1.0, seed=2)
    wave = np.concatenate([short, silence(0.2), long, silence(0.2), later])
    assert len(spans(wave, **cut)) == 3
    # The first lies within an utterance; the other two could be utterances of their own.
    (_, end), (start, _) = spans(wave, **cut, least_seconds=0.9)
    assert end == pytest.approx(2.05, abs=0.03) and start == pytest.approx(2.15, abs=0.03)
    # Also at the end; but not over a long pause, nor beyond the longest piece.
    backwards = np.ascontiguousarray(wave[::-1])
    (_, end), _ = spans(backwards, **cut, least_seconds=0.9)
    assert end == pytest.approx(1.05, abs=0.03)
    apart = np.concatenate([short, silence(0.4), long])
    assert len(spans(apart, **cut, least_seconds=0.9)) == 2
    assert len(spans(wave, **{**cut, "max_seconds": 1.5}, least_seconds=0.9)) == 3


def test_one_channel_of_several():
    left, right = speech(1.0), silence(1.0)
    wave = np.stack([left, right], 1)
    assert len(list(split_audio(audio(wave), channel=0))) == 1
    assert list(split_audio(audio(wave), channel=1)) == []
    with pytest.raises(UserError, match="2 channels, counted from 0: there is no 2"):
        list(split_audio(audio(wave), channel=2))


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.booleans(), st.floats(0.15, 6)), min_size=1, max_size=6),
    st.sampled_from([8000, 16000, 44100]),
)
def test_all_speech_lies_in_some_segment(parts, rate):
    wave = np.concatenate([(speech if loud else silence)(s, rate) for loud, s in parts])
    segments = list(split_audio(audio(wave, rate), SegmentationConfig(max_seconds=5)))
    covered = np.zeros(len(wave), bool)
    end = 0.0
    for segment in segments:
        assert segment.start + segment.overlap >= end - 1e-2 and 0 < segment.seconds <= 5.01
        end = segment.start + segment.seconds
        low = int(segment.start * rate)
        covered[low : low + int((segment.seconds + 0.002) * rate)] = True
    start = 0
    for loud, seconds in parts:
        size = int(seconds * rate)
        if loud:
            missing = np.count_nonzero(~covered[start : start + size])
            assert missing <= 0.015 * rate, f"{missing / rate} s of speech lost"
        start += size


def test_silence_has_no_segments_and_all_formats_are_read():
    assert spans(silence(9)) == [] and spans(np.zeros(1, np.float32)) == []
    wave = np.stack([speech(2, 44100), speech(2, 44100, seed=2)], axis=1)
    for form in ("FLAC", "OGG", "MP3"):
        (segment,) = split_audio(audio(wave, 44100, form))
        assert abs(segment.seconds - 2) < 0.1 and segment.wave.dim() == 1


def test_errors_name_the_file_and_the_cause():
    with pytest.raises(UserError, match="cannot be read as audio"):
        list(split_audio(io.BytesIO(b"not audio at all")))
    with pytest.raises(UserError, match="/nowhere"):
        list(split_audio("/nowhere/x.wav"))
    buffer = io.BytesIO()
    wave = speech(1)
    wave[5] = np.nan
    soundfile.write(buffer, wave, RATE, format="WAV", subtype="FLOAT")
    buffer.seek(0)
    with pytest.raises(UserError, match="not finite"):
        list(split_audio(buffer))
    with pytest.raises(UserError, match="max_seconds"):
        SegmentationConfig(max_seconds=0.5)


def test_a_file_without_samples_is_no_audio(tmp_path):
    soundfile.write(tmp_path / "none.wav", np.zeros(0, np.int16), 16_000)
    with pytest.raises(UserError, match=r"none\.wav holds no audio"):
        list(split_audio(tmp_path / "none.wav"))
    # One whose last block ends with a segment is no such file.
    config = SegmentationConfig(max_seconds=5.0)
    soundfile.write(tmp_path / "zero.wav", np.zeros(10 * 16_000, np.int16), 16_000)
    assert list(split_audio(tmp_path / "zero.wav", config)) == []
