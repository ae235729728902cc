"""Audio decoding: bytes to a wave at the sampling rate of the features."""

from __future__ import annotations

import torch
from torch import Tensor

from dsasr.data.audio import mp3
from dsasr.data.audio.files import (
    ERRORS,
    MAX_CHANNELS,
    MAX_MISSING,
    AudioError,
    check_whole,
    claimed_frames,
    open_audio,
    read_mono,
)
from dsasr.data.audio.resampling import RATE, resample


def decode(
    data: bytes, *, rate: int = RATE, max_seconds: float = 60.0, cut: bool = False
) -> Tensor:
    """WAV, FLAC, Ogg (Vorbis, Opus) or MP3 bytes → float32 mono [n] in [-1, 1] at ``rate``.

    At most ``max_seconds`` are ever decoded, so a file that claims hours, or unpacks to them, costs
    no memory. Longer audio is an error, or with ``cut`` it is cut there. Channels are averaged.
    Lossy formats may slightly exceed 1.
    Raises `AudioError`: decode_error, truncated_audio (shorter than the file says), empty_audio,
    too_long, nan_audio, out_of_scale (above `MAX_PEAK`), antiphase (channels that cancel out).
    """
    try:
        check_whole(data)
        with open_audio(data) as file:
            source = file.samplerate
            if not 1000 <= source <= 768_000 or file.channels > MAX_CHANNELS:
                shape = f"sampling rate {source} Hz, {file.channels} channels"
                raise AudioError("decode_error", shape)
            limit = int(max_seconds * source) + (not cut)
            mono, claimed = read_mono(file, limit), claimed_frames(file)
    except ERRORS as error:
        raise AudioError("decode_error", getattr(error, "error_string", str(error))) from None
    if len(mono) >= limit and not cut:
        raise AudioError("too_long", f"more than {max_seconds:g} s")
    if len(mono) < min(claimed, limit) * (1 - MAX_MISSING):
        # libsndfile stops at a damaged page of Ogg without an error.
        cause = "truncated_audio" if mp3.is_mp3(data) else "decode_error"
        raise AudioError(cause, f"ends after {len(mono)} of {claimed} samples")
    if not len(mono):
        raise AudioError("empty_audio", "no samples")
    return resample(torch.from_numpy(mono), source, rate)
