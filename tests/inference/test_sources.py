"""Paths, open files, bytes, arrays and tensors give the same pieces; what is no audio is named."""

import io

import numpy as np
import pytest
import soundfile
import torch

from dsasr.inference.segmentation import SegmentationConfig
from dsasr.inference.sources import Samples, damage, name_of, split_source
from dsasr.utils.errors import UserError

RATE = 16_000
CONFIG = SegmentationConfig(vad="energy")


def speech(seconds: float = 1.5) -> np.ndarray:
    return np.random.default_rng(0).normal(0, 0.1, int(seconds * RATE)).astype(np.float32)


def pieces(source, **options) -> list[tuple[float, int]]:
    return [(s.start, len(s.wave)) for s in split_source(source, CONFIG, **options)]


def test_all_forms_of_one_recording(tmp_path):
    wave, path = speech(), tmp_path / "a.wav"
    soundfile.write(path, wave, RATE, subtype="FLOAT")
    data = path.read_bytes()
    expected = pieces(path)
    assert expected == [(0.0, len(wave))]
    stereo = np.stack([wave, np.zeros_like(wave)], 1)
    whole = (wave * 32767).astype(np.int16)
    for source in (str(path), data, io.BytesIO(data), wave, torch.from_numpy(wave), whole,
                   Samples(wave, RATE, "mine"), Samples(stereo)):  # fmt: skip
        assert pieces(source) == expected, name_of(source)
    assert pieces(stereo, channel=0) == expected and pieces(stereo, channel=1) == []
    half = Samples(wave[::2], RATE // 2)
    assert pieces(half) == expected
    assert [name_of(s) for s in (path, data, Samples(wave, name="b"))] == [str(path), "-", "b"]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (np.zeros(0, np.float32), "holds no audio: it has no samples"),
        (np.full(100, np.nan, np.float32), "samples that are not finite"),
        (np.full(100, 3e4, np.float32), "divide by 32,768"),
        (np.zeros((2, 3, 4)), r"not float64 of shape \[2, 3, 4\]"),
        (np.zeros((2, 9000)), "channels come last"),
        (np.array(["a"]), "give samples"),
        (Samples(np.zeros(10), 5), "a sampling rate of 5 Hz"),
        (b"", "cannot be read as audio"),
        (b"just text", "cannot be read as audio"),
    ],
)
def test_what_is_no_audio(source, message):
    with pytest.raises(UserError, match=message):
        list(split_source(source, CONFIG))


def test_a_channel_that_is_not_there():
    with pytest.raises(UserError, match="no channel 1"):
        list(split_source(speech(), CONFIG, channel=1))


def test_a_file_that_is_cut_off_is_named(tmp_path):
    path = tmp_path / "a.wav"
    soundfile.write(path, speech(), RATE)
    assert damage(path) == () and damage(b"") == ()
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert pieces(path)  # what is there is transcribed
    (found,) = damage(path)
    assert found.startswith("truncated_audio: ")
    (tmp_path / "b.wav").write_bytes(b"")
    assert damage(tmp_path / "b.wav") == () and damage(tmp_path / "none.wav") == ()
