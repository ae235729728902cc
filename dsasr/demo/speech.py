"""Synthetic audio of the demo's corpus: sentences spoken by espeak-ng's voices, and non-speech."""

# ruff: noqa: SIM905 - word lists read better as text
from __future__ import annotations

import functools
import io
from dataclasses import dataclass

import numpy as np

from dsasr.data.text import espeak
from dsasr.data.text.scripts import script_runs

RATE = 16000

# espeak-ng's voice variants, without whispers, croaks, robots and strong echoes. Speakers are
# split like sentences: those of valid and test are in no training utterance.
VOICES = {
    "train": (
        "m1 m2 m4 m5 m7 m8 quincy Michael Mike Mario max robert paul grandpa "
        "f1 f2 f4 linda Annie steph Andrea"
    ).split(),
    "valid": ("m6", "belinda"),
    "test": ("m3", "Alex", "f3", "f5"),
}
_LANGUAGE = {"en": "en-us", "zh": "cmn"}
_SPEED = {"en": (150, 190), "zh": (150, 190)}  # words per minute, espeak-ng's count
_NOISE_FLOOR = 1e-4  # of full scale: -80 dB, so that silence is not digital zero


@dataclass(frozen=True)
class SpeakingStyle:
    """Parameters of speech synthesis. Times in seconds; ``level``: peak, as share of full scale."""

    voice: str
    speed: float  # 0–1: slow to fast within the usual range
    pitch: int  # 0–100
    pitch_range: int  # 0–100: flat to lively
    lead: float
    trail: float
    level: float
    seed: int

    @classmethod
    def draw(cls, rng: np.random.Generator, voices: tuple[str, ...] | list[str]) -> SpeakingStyle:
        return cls(
            voice=voices[int(rng.integers(len(voices)))],
            speed=float(rng.uniform()),
            pitch=int(rng.integers(35, 66)),
            pitch_range=int(rng.integers(35, 66)),
            lead=float(rng.uniform(0.05, 0.2)),
            trail=float(rng.uniform(0.05, 0.2)),
            level=float(10 ** (rng.uniform(-12, -2) / 20)),
            seed=int(rng.integers(2**62)),
        )


@functools.lru_cache
def _resampler(rate: int):
    import torchaudio

    return torchaudio.transforms.Resample(rate, RATE)


def _resample(wave: np.ndarray, rate: int) -> np.ndarray:
    import torch

    if rate == RATE:
        return wave
    return _resampler(rate)(torch.from_numpy(wave)).numpy()


def _trim(wave: np.ndarray, threshold: float = 0.003) -> np.ndarray:
    """Without the silence at both ends, except for 10 ms."""
    loud = np.flatnonzero(np.abs(wave) > threshold)
    if not len(loud):
        return wave[:0]
    margin = RATE // 100
    return wave[max(0, loud[0] - margin) : loud[-1] + 1 + margin]


def speak(text: str, style: SpeakingStyle) -> np.ndarray:
    """Synthesize ``text``: float32 [n] in [-1, 1] at 16 kHz, bit-equal for equal arguments.

    Each script's run is spoken in its language by the same voice, so code-switched text has the
    phonemes that `EspeakPhonemizer` gives it.
    """
    parts: list[np.ndarray] = []
    for script, run in script_runs(text):
        slow, fast = _SPEED[script]
        samples, rate = espeak.synthesize(
            run.strip(),
            f"{_LANGUAGE[script]}+{style.voice}",
            words_per_minute=round(slow + (fast - slow) * style.speed),
            pitch=style.pitch,
            pitch_range=style.pitch_range,
        )
        wave = _trim(_resample(samples.astype(np.float32) / 32768, rate))
        if parts:
            parts.append(np.zeros(RATE // 25, np.float32))
        parts.append(wave)
    speech = np.concatenate(parts)
    peak = float(np.abs(speech).max(initial=0.0))
    if peak > 0:
        speech = speech * np.float32(style.level / peak)
    lead, trail = (np.zeros(round(RATE * t), np.float32) for t in (style.lead, style.trail))
    wave = np.concatenate([lead, speech, trail])
    return _with_floor(wave, np.random.default_rng(style.seed))


def _with_floor(wave: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    noise = rng.standard_normal(len(wave), dtype=np.float32) * np.float32(_NOISE_FLOOR)
    return np.clip(wave + noise, -1, 1)


def flac(wave: np.ndarray) -> bytes:
    """A 16-bit FLAC file of float32 [n] at 16 kHz."""
    import soundfile

    buffer = io.BytesIO()
    soundfile.write(buffer, wave, RATE, format="FLAC", subtype="PCM_16")
    return buffer.getvalue()


NONSPEECH = ("silence", "white", "babble")


def nonspeech(kind: str, seconds: float, utterances: list[np.ndarray], seed: int) -> np.ndarray:
    """Float32 [n] at 16 kHz without intelligible speech, of a `NONSPEECH` kind.

    Babble is eight talkers at once, each made of excerpts of ``utterances`` end to end. It is not
    the augmentation's babble: a model that trained with that is evaluated here on another one.
    """
    rng = np.random.default_rng(seed)
    n = round(seconds * RATE)
    level = np.float32(10 ** (rng.uniform(-40, -20) / 20))
    if kind == "silence":
        return _with_floor(np.zeros(n, np.float32), rng)
    if kind == "white":
        return np.clip(rng.standard_normal(n, dtype=np.float32) * level, -1, 1)
    total = np.zeros(n, np.float32)
    for _ in range(8):
        start = 0
        while start < n:
            piece = utterances[int(rng.integers(len(utterances)))]
            piece = piece[int(rng.integers(len(piece))) :][: n - start]
            total[start : start + len(piece)] += piece
            start += max(1, len(piece))
    rms = float(np.sqrt(np.mean(total**2))) or 1.0
    return np.clip(total * (level / np.float32(rms)), -1, 1)
