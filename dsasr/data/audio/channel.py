"""What lies between a speaker and a file: level, silence around the speech, bandwidth, codecs.

Training applies them to some of its samples (`dsasr.data.audio.augment`), the evaluation's suite to
a test set (`dsasr.evaluation.suite`).
"""

from __future__ import annotations

import io

import numpy as np
import soundfile
import torch
from torch import Tensor

from dsasr.data.audio.resampling import RATE, one_thread, resample

# Codec → libsndfile's format, subtype and settings. ulaw (G.711) and gsm (full rate) are those of
# telephones, at 8 kHz; mp3 is at 24 kbit/s, opus at 12 kbit/s.
CODECS: dict[str, tuple[str, str, dict]] = {
    "ulaw": ("WAV", "ULAW", {}),
    "gsm": ("WAV", "GSM610", {}),
    "mp3": ("MP3", "MPEG_LAYER_III", {"bitrate_mode": "CONSTANT", "compression_level": 0.9}),
    "opus": ("OGG", "OPUS", {"compression_level": 0.99}),
}
TELEPHONE = 8000  # Hz, of ulaw and gsm
_MP3_DELAY = 1105  # samples that an encoder puts before the sound; at low rates the decoder's too


def pad_silence(
    wave: Tensor, before: float, after: float, rng: np.random.Generator, rate: int = RATE
) -> Tensor:
    """``wave`` [n] with silence around it, ``before`` and ``after`` in seconds.

    Half of the time it is digital zero, else a device's: white noise at −100 to −45 dB of full
    scale, a third of the time with a mains hum of up to −45 dB, under the speech as well. Devices
    differ, and a model must not transcribe any of them (**ours**).
    """
    sides = (torch.zeros(int(seconds * rate)) for seconds in (before, after))
    padded = torch.cat((next(sides), wave, next(sides)))
    if rng.uniform() < 0.5:
        return padded
    noise = 10 ** (rng.uniform(-100, -45) / 20) * rng.standard_normal(len(padded))
    if rng.uniform() < 1 / 3:
        hertz, level = rng.choice((50.0, 60.0)), 10 ** (rng.uniform(-80, -45) / 20)
        phases = 2 * np.pi * (hertz * np.arange(len(padded)) / rate + rng.uniform())
        noise += level * np.sqrt(2) * np.sin(phases)
    return (padded + torch.from_numpy(noise.astype(np.float32))).clamp(-1, 1)


@one_thread()
def band_limit(wave: Tensor, band: int, rate: int = RATE) -> Tensor:
    """``wave`` [n] as it sounds through a channel sampled at ``band`` Hz (8000: a telephone)."""
    if not len(wave) or band >= rate:
        return wave
    limited = resample(resample(wave, rate, band), band, rate)
    return _same_length(limited, len(wave)).clamp(-1, 1)


@one_thread()
def through_codec(wave: Tensor, codec: str, rate: int = RATE) -> Tensor:
    """``wave`` [n] encoded and decoded by one of `CODECS`; as long as before and in its place."""
    if not len(wave):
        return wave
    kind, subtype, settings = CODECS[codec]
    inner = rate if kind in ("MP3", "OGG") else min(rate, TELEPHONE)
    source = resample(wave, rate, inner).clamp(-1, 1).numpy()
    file = io.BytesIO()
    soundfile.write(file, source, inner, subtype=subtype, format=kind, **settings)
    file.seek(0)
    decoded, _ = soundfile.read(file, dtype="float32")
    if kind == "MP3" and len(decoded) > len(source):
        decoded = decoded[_MP3_DELAY:]
    return _same_length(resample(torch.from_numpy(decoded), inner, rate), len(wave)).clamp(-1, 1)


def amplify(wave: Tensor, decibels: float) -> Tensor:
    """``wave`` [n] by ``decibels``, and by that no louder than full scale."""
    if not decibels or not len(wave):
        return wave
    factor = 10 ** (decibels / 20)
    if factor > 1:
        factor = min(factor, max(1.0, 1 / max(float(wave.abs().max()), 1e-9)))
    return wave * factor


def _same_length(wave: Tensor, samples: int) -> Tensor:
    return torch.nn.functional.pad(wave[:samples], (0, max(0, samples - len(wave))))
