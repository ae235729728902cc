"""Augmentation: speed, silence, noise, channel and level of the audio; SpecAugment on the features.

A sample's `AugmentParams` are drawn from its seed alone, without its audio
(`dsasr.data.dataloader.augment_sampler`), so that batches are planned by augmented durations and a
resumed run repeats them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache
from typing import Annotated

import numpy as np
import torch
from torch import Tensor

from dsasr.data.audio.channel import (
    CODECS,
    TELEPHONE,
    amplify,
    band_limit,
    pad_silence,
    through_codec,
)
from dsasr.data.audio.resampling import RATE, one_thread, resample
from dsasr.utils import ranges
from dsasr.utils.errors import UserError
from dsasr.utils.ranges import Decibels, NonNegativeInt, Range, Share

NOISE_KINDS = ("babble", "vehicle", "music")  # the paper's
RECORDED = "recorded"  # excerpts of the noise shards' recordings
MUSIC_RANGE = (110.0, 24)  # lowest root in Hz, number of roots above it in semitones


@dataclass(frozen=True)
class SpecAugmentConfig:
    """Masks of SpecAugment (Park et al. 2019, arXiv 1904.08779), drawn per utterance.

    Each time mask is at most ``time_width`` frames and ``time_share`` of the utterance wide. The
    defaults mask as much as icefall's: frequency masks of up to 27 bins, time masks of up to 100
    frames, and up to 15% of an utterance's frames over all time masks.
    """

    freq_masks: Annotated[int, Range(0, 1000)] = 2  # number of frequency masks
    freq_width: NonNegativeInt = 27  # widest frequency mask, in Mel bins
    time_masks: Annotated[int, Range(0, 1000)] = 2  # number of time masks
    time_width: NonNegativeInt = 100  # widest time mask, in feature frames (10 ms)
    time_share: Share = 0.075  # widest time mask, as a share of the utterance

    def __post_init__(self) -> None:
        ranges.check(self)


@dataclass(frozen=True)
class AugmentConfig:
    """Speed perturbation and noise, with NIM4-ASR's figures (arXiv 2604.18105) as defaults; what
    lies between speaker and file (`dsasr.data.audio.channel`), off by default.

    ``noise_share`` of the samples get noise at SNR ~ N(``snr_mean``, ``snr_std``) dB; before it is
    added, up to ``silence`` seconds, times a Beta(1, 3) draw, are padded on either side. ``kinds``
    are equally likely; name one twice to have it twice as often. "recorded" takes noise
    from noise shards. Of the samples without noise ``silence_share`` are padded too, evenly up to
    ``silence`` seconds: recordings often begin and end with half a second of nothing. Then a
    sample may pass a narrow band, a codec, and a change of level.
    """

    # speed factors, one drawn for each sample; 1.0 leaves it as it is
    speeds: tuple[Annotated[float, Range(0.5, 2)], ...] = (0.9, 1.0, 1.1)
    noise_share: Share = 0.2  # share of the samples that get noise, 0 to 1
    snr_mean: Decibels = 10.0  # mean signal-to-noise ratio in dB
    # standard deviation of the signal-to-noise ratio in dB
    snr_std: Annotated[float, Range(0, 100)] = 5.0
    # longest silence in seconds, padded on either side: of a noisy sample times a Beta(1, 3) draw,
    # of one without noise drawn evenly
    silence: Annotated[float, Range(0, 60)] = 1.0
    # babble, vehicle, music, recorded (dataloader.noise): drawn alike, one named twice twice as
    # often
    kinds: tuple[str, ...] = field(default=NOISE_KINDS)
    silence_share: Share = 0.0  # share of the samples without noise that are padded with silence
    # lowest and highest change of the level in dB, drawn evenly for each sample; louder only as far
    # as nothing clips
    gain_db: tuple[Decibels, Decibels] = (0.0, 0.0)
    # share of the samples that are limited to the band of a telephone (8 kHz sampling)
    band_share: Share = 0.0
    codec_share: Share = 0.0  # share of the samples that pass one of codecs
    # ulaw, gsm (telephones), mp3 (24 kbit/s), opus (12 kbit/s; ten times slower than the others)
    codecs: tuple[str, ...] = ("ulaw", "gsm", "mp3")

    def __post_init__(self) -> None:
        ranges.check(self)
        if not self.speeds:
            raise UserError("augment.speeds: one or more factors between 0.5 and 2")
        unknown = [k for k in self.kinds if k not in (*NOISE_KINDS, RECORDED)]
        if unknown or not self.kinds:
            raise UserError(f"augment.kinds: choose from {', '.join((*NOISE_KINDS, RECORDED))}")
        if self.gain_db[0] > self.gain_db[1]:
            raise UserError("augment.gain_db: give [lowest, highest] in dB, such as [-20, 6]")
        if not self.codecs or any(codec not in CODECS for codec in self.codecs):
            raise UserError(f"augment.codecs: choose from {', '.join(CODECS)}")


@dataclass(frozen=True)
class AugmentParams:
    """How one sample is augmented; by default not at all. ``noise`` None: no noise."""

    speed: float = 1.0
    noise: str | None = None  # kind
    snr: float = 0.0  # dB
    before: float = 0.0  # seconds of silence
    after: float = 0.0
    seed: int = 0  # of the noise
    narrow: bool = False  # the band of a telephone
    codec: str | None = None
    gain: float = 0.0  # dB


@one_thread()
def augment_wave(
    wave: Tensor,
    params: AugmentParams,
    voices: Sequence[Tensor] = (),
    rate: int = RATE,
    recordings: Sequence[Tensor] = (),
) -> Tensor:
    """``wave`` [n] after ``params``: speed, silence, noise over all of it, band, codec, level.

    ``voices`` are other utterances, for babble; without any, babble is made of the utterance
    itself. ``recordings`` come from noise shards. Speed is Kaldi's: resampling, so that pitch
    follows.
    """
    if params.speed != 1.0:
        ratio = Fraction(params.speed).limit_denominator(1000)
        wave = resample(wave, ratio.numerator, ratio.denominator)
    if not len(wave):
        return wave
    wave = _surround(wave, params, voices, rate, recordings)
    if params.narrow:
        wave = band_limit(wave, TELEPHONE, rate)
    if params.codec is not None:
        wave = through_codec(wave, params.codec, rate)
    return amplify(wave, params.gain)


def _surround(
    wave: Tensor,
    params: AugmentParams,
    voices: Sequence[Tensor],
    rate: int,
    recordings: Sequence[Tensor],
) -> Tensor:
    """``wave`` with silence around it, and with noise over both."""
    if params.noise is None and not (params.before or params.after):
        return wave
    rng = np.random.Generator(np.random.PCG64([params.seed & 0xFFFFFFFF, params.seed >> 32, 1]))
    if params.noise is None:
        return pad_silence(wave, params.before, params.after, rng, rate)
    before, after = (torch.zeros(int(s * rate)) for s in (params.before, params.after))
    speech_power = float(wave.square().mean())
    padded = torch.cat((before, wave, after))
    sources = recordings if params.noise == RECORDED else (voices or (wave,))
    noise = generate_noise(params.noise, len(padded), rng, sources, rate)
    return mix(padded, noise, params.snr, speech_power)


@one_thread()
def mix(wave: Tensor, noise: Tensor, snr: float, speech_power: float | None = None) -> Tensor:
    """``wave`` + ``noise`` [n] at ``snr`` dB; scaled down where the sum would clip.

    ``speech_power`` is the power of the speech without the silence around it.
    """
    power = float(wave.square().mean()) if speech_power is None else speech_power
    noise_power = float(noise.square().mean())
    if power <= 0 or noise_power <= 0:
        return wave
    mixed = torch.add(wave, noise, alpha=(power / (noise_power * 10 ** (snr / 10))) ** 0.5)
    peak = float(mixed.abs().max())
    return mixed / peak if peak > 1 else mixed


@one_thread()
def generate_noise(
    kind: str, samples: int, rng: np.random.Generator, sources: Sequence[Tensor], rate: int = RATE
) -> Tensor:
    """Noise [samples] of one of `NOISE_KINDS`, or recorded, from ``rng``; at no defined level.

    babble: four excerpts of ``sources`` at once; recorded: one excerpt of one of them; vehicle:
    noise that falls by 6 dB an octave above 60 Hz, with a slow swell; music: decaying chords.
    Sources are repeated where they are too short. Raises ValueError if there are none.

    The evaluation suite (`dsasr.evaluation.suite`) and the demo's corpus (`dsasr.demo.speech`)
    generate babble and music of their own, on purpose: a model that trained with this noise is
    evaluated on noise that it was not trained on. These here are made for speed, as they run for
    every noisy sample of the training data.
    """
    if kind == "vehicle":
        return _vehicle(samples, rng, rate)
    if kind == "music":
        return _music(samples, rng, rate)
    if kind not in ("babble", RECORDED):
        raise ValueError(f"no noise of kind {kind!r}")
    usable = [source for source in sources if len(source)]
    if not usable:
        raise ValueError(f"{kind} noise needs recordings to take it from")
    total = torch.zeros(samples)
    for _ in range(4 if kind == "babble" else 1):
        _add_excerpt(total, usable[int(rng.integers(len(usable)))], rng)
    return total


def _add_excerpt(total: Tensor, source: Tensor, rng: np.random.Generator) -> None:
    """Add ``source``, from a random start and repeated, to all of ``total``."""
    at, start = 0, int(rng.integers(len(source)))
    while at < len(total):
        count = min(len(total) - at, len(source) - start)
        total[at : at + count] += source[start : start + count]
        at, start = at + count, 0


def _vehicle(samples: int, rng: np.random.Generator, rate: int) -> Tensor:
    size = _fast_size(samples)
    # Torch's memory is aligned the same in every process, unlike numpy's.
    white = torch.empty(size)
    rng.standard_normal(dtype=np.float32, out=white.numpy())
    spectrum = torch.fft.rfft(white) * _slope(size, rate)
    shaped = torch.fft.irfft(spectrum, n=size)[:samples]
    turns = float(rng.uniform(0.1, 0.5)) * samples / rate
    return shaped.mul_(torch.linspace(0, 2 * torch.pi * turns, samples).sin_().mul_(0.3).add_(1))


def _fast_size(samples: int) -> int:
    """The next of eight lengths an octave: few slopes to cache, and quick to transform."""
    step = max(1, (1 << samples.bit_length()) // 16)
    return -(-samples // step) * step


@lru_cache(maxsize=64)
def _slope(size: int, rate: int) -> Tensor:
    hertz = torch.linspace(0, rate / 2, size // 2 + 1)
    return (1 + (hertz / 60.0) ** 2).rsqrt()


def _music(samples: int, rng: np.random.Generator, rate: int) -> Tensor:
    length = int(rate * float(rng.uniform(0.25, 0.5)))
    roots = rng.integers(MUSIC_RANGE[1], size=-(-samples // length))
    return torch.cat([_chord(int(root), rate)[:length] for root in roots])[:samples]


@lru_cache(maxsize=64)
def _chord(semitones: int, rate: int) -> Tensor:
    """Half a second [rate / 2] of a decaying major triad, each tone with three harmonics."""
    times = torch.arange(rate // 2) / rate
    root = MUSIC_RANGE[0] * 2 ** (semitones / 12)
    total = torch.zeros(len(times))
    for step in (0, 4, 7):
        for harmonic in (1, 2, 3):
            hertz = root * 2 ** (step / 12) * harmonic
            total += torch.sin(2 * torch.pi * hertz * times) / harmonic
    return total * torch.exp(-3 * times)


def spec_augment(
    features_BTF: Tensor,
    lengths_B: Tensor,
    cfg: SpecAugmentConfig,
    generator: torch.Generator,
    stack: int = 1,
) -> Tensor:
    """A copy of ``features_BTF`` with frequency and time masks, zero (the mean, after CMVN) inside.

    ``stack``: spectral frames that lie side by side in a row of features; each is masked as if it
    stood by itself. The masks depend on ``generator`` and ``lengths_B`` only. With a generator on
    the CPU they are the same on every device; nothing waits for the device.
    """
    if stack > 1:
        rows_BTF = features_BTF.reshape(len(features_BTF), -1, features_BTF.shape[2] // stack)
        masked_BTF = spec_augment(rows_BTF, lengths_B * stack, cfg, generator)
        return masked_BTF.reshape(features_BTF.shape)
    count, frames, mels = features_BTF.shape
    device = features_BTF.device
    lengths = lengths_B.to(device, non_blocking=True)
    widths = (lengths.double() * cfg.time_share).long().clamp(max=cfg.time_width)
    masked_BT = _spans(cfg.time_masks, frames, lengths, widths, generator)
    full = torch.full((count,), mels, device=device)
    widths = torch.full((count,), min(cfg.freq_width, mels), device=device)
    masked_BF = _spans(cfg.freq_masks, mels, full, widths, generator)
    return features_BTF.masked_fill(masked_BT[:, :, None] | masked_BF[:, None, :], 0.0)


def _spans(
    masks: int, size: int, lengths_B: Tensor, widths_B: Tensor, generator: torch.Generator
) -> Tensor:
    """[B, size] True inside ``masks`` spans, each up to ``widths_B`` wide within ``lengths_B``."""
    count, device = len(lengths_B), lengths_B.device
    draws = torch.rand(2, masks, count, 1, generator=generator, device=generator.device)
    draws = draws.to(device, non_blocking=True)
    width = (draws[0] * (widths_B[:, None] + 1)).long()
    start = (draws[1] * (lengths_B[:, None] - width + 1).clamp_min(1)).long()
    position = torch.arange(size, device=device)
    return ((position >= start) & (position < start + width)).any(0)
