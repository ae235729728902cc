"""Audio files: every sample that a file holds, or why it cannot be used.

The frame count of a header is an estimate for some formats and missing from others (FLAC written
to a pipe), so files are decoded to their end. libsndfile reads WAV, FLAC, Ogg, MP3, AIFF, AU and
more; what it does not know (M4A, WebM …) is decoded by ffmpeg where that is installed.
"""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

import numpy as np
import soundfile

from dsasr.data.audio import flac, mp3

MAX_CHANNELS = 64
MAX_SECONDS = 1e7  # the longest duration that a header may claim
MAX_MISSING = 0.01  # share by which audio may be shorter than its header says
MAX_PEAK = 16.0  # of full scale: floats of lossy and loud audio pass, those at integer scale do not
ANTIPHASE = 1e-4  # of the channels' mean power: what their average has if they cancel out, -40 dB
_BLOCK = 65_536  # samples
_UNKNOWN = 0x7FFF_0000  # bytes of a WAV's data from which on its size stands for "until the end"
# Read by libsndfile; shards keep those of `dsasr.data.shards.sample.EXTENSIONS` as they are.
SNDFILE = ("flac", "wav", "opus", "ogg", "oga", "mp3", "aif", "aiff", "au", "caf", "w64", "rf64")
FFMPEG = ("m4a", "mp4", "aac", "webm", "mkv", "mka", "wma", "amr", "3gp", "ac3", "sph", "wv", "ape")
ERRORS = (soundfile.LibsndfileError, RuntimeError, ValueError, TypeError, EOFError)


class AudioError(Exception):
    """Audio that cannot be used: ``cause`` in short snake_case, ``detail`` for a person."""

    def __init__(self, cause: str, detail: str = ""):
        super().__init__(cause, detail)
        self.cause, self.detail = cause, detail


def open_audio(source: bytes | str | Path | BinaryIO) -> soundfile.SoundFile:
    """A file to read samples from, with all that ``source`` holds. Raises one of `ERRORS`,
    `AudioError` needs_ffmpeg, and OSError."""
    if isinstance(source, bytes):
        return soundfile.SoundFile(io.BytesIO(_with_length(source)))
    if isinstance(source, (str, Path)):
        kind = Path(source).suffix.lower().lstrip(".")
        if kind in FFMPEG:
            return soundfile.SoundFile(_by_ffmpeg(Path(source)))
        with open(source, "rb") as file:
            unknown = kind == "mp3" or flac.lacks_sample_count(file.read(26))
        if unknown:
            return soundfile.SoundFile(io.BytesIO(_measured(source, os.stat(source).st_mtime_ns)))
        return soundfile.SoundFile(os.fspath(source))
    return soundfile.SoundFile(source)


def _with_length(data: bytes) -> bytes:
    return flac.with_sample_count(mp3.with_frame_count(data))


@lru_cache(maxsize=1)  # of a recording that many utterances are cut out of
def _measured(path: str | Path, mtime_ns: int) -> bytes:
    """``mtime_ns`` is part of the cache's key: a file that has changed is read anew."""
    return _with_length(Path(path).read_bytes())


def _by_ffmpeg(path: Path) -> BinaryIO:
    """16-bit WAV of a file that libsndfile does not read, in a temporary file: an hour is large."""
    program = shutil.which("ffmpeg")
    if program is None:
        raise AudioError("needs_ffmpeg", f"install ffmpeg to read {path.suffix}, or convert it")
    if not path.is_file():
        raise FileNotFoundError(2, "no such file", str(path))
    command = [program, "-v", "error", "-nostdin", "-protocol_whitelist", "file", "-i"]
    command += [f"file:{path}", "-vn", "-map", "0:a:0", "-c:a", "pcm_s16le", "-f", "wav", "pipe:1"]
    wav = tempfile.TemporaryFile()  # noqa: SIM115 - the caller reads it
    done = subprocess.run(command, stdout=wav, stderr=subprocess.PIPE, check=False)
    if done.returncode or wav.seek(0, os.SEEK_END) <= 44:
        wav.close()
        lines = done.stderr.decode("utf-8", "replace").strip().splitlines()
        raise AudioError("decode_error", f"ffmpeg: {lines[-1] if lines else 'no audio'}")
    wav.seek(0)
    return wav


def claimed_frames(file: soundfile.SoundFile) -> int:
    """The number of samples that a header claims; 0 where it claims none."""
    return file.frames if file.frames < MAX_SECONDS * max(file.samplerate, 1) else 0


def audio_seconds(data: bytes) -> float:
    """Duration of encoded audio by its header; 0.0 if it has none. Raises one of `ERRORS`, and
    `AudioError` truncated_audio where it has fewer bytes than it says."""
    check_whole(data)
    with open_audio(data) as file:
        return claimed_frames(file) / max(file.samplerate, 1)


def read_mono(file: soundfile.SoundFile, limit: int) -> np.ndarray:
    """Up to ``limit`` samples float32 [n], channels averaged, in blocks until the file ends.

    Raises `AudioError`: decode_error (of Ogg, at a damaged page libsndfile ends a block early and
    reads on behind it), nan_audio, out_of_scale, antiphase.
    """
    blocks, count, short = [], 0, False
    of_mono = of_channels = 0.0
    while count < limit:
        block = file.read(frames=min(_BLOCK, limit - count), dtype="float32", always_2d=True)
        if not len(block):
            break
        if short and file.format == "OGG":
            raise AudioError("decode_error", f"damaged after {count} samples")
        short = len(block) < min(_BLOCK, limit - count)
        mono = block[:, 0] if file.channels == 1 else block.mean(axis=1)
        check_scale(mono)
        if file.channels > 1:
            of_mono += float(np.square(mono, dtype=np.float64).sum())
            of_channels += float(np.square(block, dtype=np.float64).sum()) / file.channels
        blocks.append(mono)
        count += len(block)
    if of_mono < ANTIPHASE * of_channels:
        detail = "its channels cancel out: keep one of them, or turn one around"
        raise AudioError("antiphase", detail)
    return np.concatenate(blocks) if blocks else np.zeros(0, np.float32)


def check_scale(wave: np.ndarray) -> None:
    """Raise `AudioError` for samples that are not finite, and for those far above full scale."""
    # NaN is the highest and the lowest of any samples that it is among.
    peak = max(float(wave.max(initial=0.0)), -float(wave.min(initial=0.0)))
    if not np.isfinite(peak):
        raise AudioError("nan_audio", "samples that are not finite")
    if peak > MAX_PEAK:
        detail = f"samples up to {peak:,.4g}, where 1 is full scale"
        scaled = "; divide by 32,768" if peak <= 32_768 else ""
        raise AudioError("out_of_scale", detail + scaled)


def is_silent(wave: np.ndarray) -> bool:
    """Whether all samples [n] are zero; of other audio the first ones tell."""
    size = 1024  # samples looked at together
    return not any(wave[at : at + size].any() for at in range(0, len(wave), size))


def check_whole(data: bytes) -> None:
    """Raise `AudioError` truncated_audio for a WAV, FLAC or Ogg file that is cut off.

    Of WAV and Ogg libsndfile takes the rest for the whole. A WAV written to a pipe has no size to
    compare with.
    """
    if data[:4] == b"RIFF" and data[8:12] == b"WAVE":
        _check_wav(data)
    elif data[:4] == b"OggS":
        _check_ogg(data)
    elif flac.is_cut_off(data, MAX_MISSING):
        raise AudioError("truncated_audio", "its last frame ends before its header says")


def _check_wav(data: bytes) -> None:
    at = 12
    while at + 8 <= len(data):
        size = int.from_bytes(data[at + 4 : at + 8], "little")
        if data[at : at + 4] == b"data":
            there = len(data) - at - 8
            if there < size * (1 - MAX_MISSING) and size < _UNKNOWN:
                raise AudioError("truncated_audio", f"{there:,} of {size:,} bytes of samples")
            return
        at += 8 + size + size % 2


def _check_ogg(data: bytes) -> None:
    at = data.rfind(b"OggS")
    segments = data[at + 27 : at + 27 + data[at + 26]] if at + 26 < len(data) else None
    if segments is None or at + 27 + data[at + 26] + sum(segments) > len(data):
        raise AudioError("truncated_audio", "its last page is cut off")
