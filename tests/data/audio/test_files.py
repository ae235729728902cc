"""What audio files hold, whatever their headers say; and what cannot be used, by name."""

from __future__ import annotations

import io
import struct
from pathlib import Path

import numpy as np
import pytest
import soundfile

from dsasr.data.audio import flac, mp3
from dsasr.data.audio.decoding import decode
from dsasr.data.audio.files import (
    AudioError,
    audio_seconds,
    check_scale,
    is_silent,
    open_audio,
)

CASES = Path(__file__).parents[4] / "shared" / "cases"
RATE = 16_000


def noise(samples: int, channels: int = 1) -> np.ndarray:
    wave = np.random.default_rng(samples).standard_normal((samples, channels)) * 0.1
    return wave.astype(np.float32)


def encoded(wave: np.ndarray, form: str = "WAV", rate: int = RATE, **options) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, wave, rate, format=form, **options)
    return buffer.getvalue()


def cause(data: bytes) -> str:
    with pytest.raises(AudioError) as caught:
        decode(data)
    return caught.value.cause


def headless(data: bytes) -> bytes:
    """An MP3 without the frame that says how many there are."""
    first = next(mp3._frames(data))
    assert data[first.tag_at : first.tag_at + 4] in (b"Xing", b"Info")
    return data[first.start + first.size :]


@pytest.mark.parametrize("rate", [8000, 16_000, 22_050, 44_100, 48_000])
@pytest.mark.parametrize("channels", [1, 2])
def test_an_mp3_is_decoded_to_its_last_frame(rate, channels):
    whole = encoded(noise(2 * rate, channels), "MP3", rate)
    data = headless(whole)
    frames = list(mp3._frames(data))
    by_estimate = soundfile.info(io.BytesIO(data)).frames
    with open_audio(data) as file:
        assert file.frames == len(file.read()) > 1.1 * by_estimate
        assert sum(frame.samples for frame in frames) - file.frames == 529  # the decoder's delay
    assert mp3.with_frame_count(whole) == whole
    assert audio_seconds(whole) == 2.0
    assert audio_seconds(whole + whole) > 3.9  # one after another, under the first's header


def test_what_is_no_mp3_is_left_as_it_is():
    wave = noise(9 * RATE)
    files = [encoded(wave, form) for form in ("WAV", "FLAC", "OGG")]  # with bytes like frames
    for data in (b"", b"ID3", b"\xff", b"\xff\xfb" * 40, bytes(5000), *files):
        assert mp3.with_frame_count(data) is data and flac.with_sample_count(data) is data


def pipe_flac(wave: np.ndarray, rate: int = RATE) -> tuple[bytes, bytes]:
    """A FLAC file, and the same as written to a pipe: without its length."""
    whole = encoded(wave, "FLAC", rate, subtype="PCM_16")
    values = int.from_bytes(whole[18:26], "big")
    return whole, whole[:18] + (values >> 36 << 36).to_bytes(8, "big") + whole[26:]


@pytest.mark.parametrize("samples", [1, 100, 4096, 4097, 70_000, 600_000])
@pytest.mark.parametrize("rate", [8000, 12_345, 44_100])
def test_flac_from_a_pipe_has_the_length_of_its_last_frame(samples, rate):
    whole, data = pipe_flac(noise(samples, 1 + samples % 2), rate)
    assert flac.with_sample_count(data) == whole
    assert audio_seconds(data) == samples / rate


def test_a_file_that_is_cut_off_is_named():
    wave = noise(3 * RATE)
    for form, options in (("WAV", {}), ("OGG", {"subtype": "OPUS"}), ("OGG", {}), ("FLAC", {})):
        data = encoded(wave, form, **options)
        assert len(decode(data)) > 2.9 * RATE
        assert cause(data[: len(data) // 2]) == "truncated_audio"
    data = encoded(wave)
    for size in (0xFFFF_FFFF, 0x7FFF_FFFF):  # as ffmpeg and SoX write to a pipe
        assert len(decode(data[:40] + struct.pack("<I", size) + data[44:])) == len(wave)


def test_what_no_model_should_learn_from_is_named():
    wave = noise(RATE)[:, 0]
    assert cause(encoded(wave * 32_768, subtype="FLOAT")) == "out_of_scale"
    huge = wave.copy()
    huge[7] = 1e30
    assert cause(encoded(huge, subtype="FLOAT")) == "out_of_scale"
    assert cause(encoded(np.stack([wave, -wave], 1), subtype="FLOAT")) == "antiphase"
    assert len(decode(encoded(np.stack([wave, 0 * wave], 1), subtype="FLOAT"))) == RATE
    assert len(decode(encoded(4 * wave, subtype="FLOAT"))) == RATE  # loud, but audio
    assert not decode(encoded(np.zeros(RATE))).any()  # silence may be meant: of non-speech sets


@pytest.mark.parametrize("form", ["AIFF", "AU"])
def test_formats_that_libsndfile_reads(form, tmp_path):
    path = tmp_path / f"a.{form.lower()}"
    path.write_bytes(encoded(noise(RATE), form))
    with open_audio(path) as file:
        assert file.frames == RATE


def test_other_formats_need_ffmpeg(tmp_path, monkeypatch):
    path = tmp_path / "a.m4a"
    path.write_bytes(b"....ftypM4A ")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(AudioError, match="needs_ffmpeg"):
        open_audio(path)
    program = tmp_path / "ffmpeg"
    program.write_text('#!/bin/sh\necho "moov atom not found" >&2\nexit 1\n')
    program.chmod(0o755)
    with pytest.raises(AudioError, match="moov atom not found"):
        open_audio(path)
    wav = tmp_path / "whole.wav"
    wav.write_bytes(encoded(noise(RATE)))
    program.write_text(f"#!/bin/sh\nexec /bin/cat {wav}\n")
    with open_audio(path) as file:
        assert file.frames == RATE


@pytest.mark.skipif(not CASES.is_dir(), reason="recordings of ../shared")
def test_files_that_were_decoded_in_part_or_not_at_all():
    def read(name: str) -> bytes:
        return (CASES / name).read_bytes()

    assert len(decode(read("vbr_noxing.mp3"))) == 96 * 576 - 529
    assert len(decode(read("pipe.flac"))) == 53_760
    assert cause(read("trunc.wav")) == cause(read("trunc_opus.ogg")) == "truncated_audio"
    assert cause(read("zerosamples.wav")) == "empty_audio"


@pytest.mark.parametrize("at", [0, 1023, 1024, 5000])
def test_one_sample_is_no_silence_and_one_nan_is_refused(at):
    wave = np.zeros(5001, np.float32)
    assert is_silent(wave) and is_silent(wave[:0])
    wave[at] = -1e-9
    assert not is_silent(wave)
    check_scale(wave)
    for value, cause in ((np.nan, "nan_audio"), (-np.inf, "nan_audio"), (-99.0, "out_of_scale")):
        wave[at] = value
        with pytest.raises(AudioError) as caught:
            check_scale(wave)
        assert caught.value.cause == cause
