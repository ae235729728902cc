"""Augmentation: speed, silence and noise on the audio; SpecAugment on the features.

What happens to a sample is drawn from its seed alone (`draw`), without its audio, so that the
planner knows its duration beforehand and a resumed run repeats it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from dsasr.data.audio import RATE, resample
from dsasr.errors import UserError

KINDS = ("babble", "vehicle", "music")


@dataclass(frozen=True)
class SpecAugmentConfig:
    """Masks of SpecAugment (Park et al. 2019, arXiv 1904.08779), drawn per utterance.

    Each time mask is at most ``time_width`` frames and ``time_share`` of the utterance wide.
    """

    freq_masks: int = 2
    freq_width: int = 27
    time_masks: int = 2
    time_width: int = 40
    time_share: float = 0.1

    def __post_init__(self) -> None:
        if min(self.freq_masks, self.freq_width, self.time_masks, self.time_width) < 0:
            raise UserError("spec: counts and widths of masks must not be negative")
        if not 0 <= self.time_share <= 1:
            raise UserError("spec.time_share must lie between 0 and 1")


@dataclass(frozen=True)
class AugmentConfig:
    """Speed perturbation and noise, with NIM4-ASR's figures (arXiv 2604.18105) as defaults.

    ``noise_share`` of the samples get noise at SNR ~ N(``snr_mean``, ``snr_std``) dB; before it is
    added, up to ``silence`` seconds, times a Beta(1, 3) draw, are padded on either side.
    """

    speeds: tuple[float, ...] = (0.9, 1.0, 1.1)
    noise_share: float = 0.2
    snr_mean: float = 10.0
    snr_std: float = 5.0
    silence: float = 1.0
    kinds: tuple[str, ...] = field(default=KINDS)

    def __post_init__(self) -> None:
        if not self.speeds or any(not 0.5 <= s <= 2 for s in self.speeds):
            raise UserError("augment.speeds: one or more factors between 0.5 and 2")
        if not 0 <= self.noise_share <= 1 or self.snr_std < 0 or self.silence < 0:
            raise UserError("augment: noise_share in [0, 1], snr_std ≥ 0, silence ≥ 0")
        unknown = [k for k in self.kinds if k not in KINDS]
        if unknown or not self.kinds:
            raise UserError(f"augment.kinds: choose from {', '.join(KINDS)}")


@dataclass(frozen=True)
class Draw:
    """What happens to one sample. ``noise`` None: neither silence nor noise. Seconds and dB."""

    speed: float = 1.0
    noise: str | None = None
    snr: float = 0.0
    before: float = 0.0
    after: float = 0.0
    seed: int = 0

    def seconds(self, duration: float) -> float:
        """The duration after augmentation."""
        return duration / self.speed + self.before + self.after


def draw(cfg: AugmentConfig, seed: int) -> Draw:
    """The sample's fate; pure and cheap."""
    rng = np.random.Generator(np.random.PCG64(seed))
    speed = cfg.speeds[int(rng.integers(len(cfg.speeds)))]
    if rng.random() >= cfg.noise_share:
        return Draw(speed, seed=seed)
    return Draw(
        speed=speed,
        noise=cfg.kinds[int(rng.integers(len(cfg.kinds)))],
        snr=float(rng.normal(cfg.snr_mean, cfg.snr_std)),
        before=float(cfg.silence * rng.beta(1, 3)),
        after=float(cfg.silence * rng.beta(1, 3)),
        seed=seed,
    )


def apply(wave: Tensor, drawn: Draw, noises: Sequence[Tensor] = (), rate: int = RATE) -> Tensor:
    """``wave`` [n] as ``drawn``: speed, then silence, then noise over all of it.

    ``noises`` are recordings to take babble (or, in general, noise) from; without any, babble is
    made from the utterance itself. Speed is kaldi's: resampling, so that pitch follows.
    """
    if drawn.speed != 1.0:
        wave = resample(wave, round(100 * drawn.speed), 100)
    if drawn.noise is None:
        return wave
    rng = np.random.Generator(np.random.PCG64([drawn.seed & 0xFFFFFFFF, drawn.seed >> 32, 1]))
    before, after = (torch.zeros(int(s * rate)) for s in (drawn.before, drawn.after))
    speech_power = float(wave.square().mean())
    padded = torch.cat((before, wave, after))
    noise = make_noise(drawn.noise, len(padded), rng, noises or (wave,), rate)
    return mix(padded, noise, drawn.snr, speech_power)


def mix(wave: Tensor, noise: Tensor, snr: float, speech_power: float | None = None) -> Tensor:
    """``wave`` + ``noise`` [n] at ``snr`` dB; scaled down where the sum would clip.

    ``speech_power`` is the power of the speech without the silence around it.
    """
    power = float(wave.square().mean()) if speech_power is None else speech_power
    noise_power = float(noise.square().mean())
    if power <= 0 or noise_power <= 0:
        return wave
    mixed = wave + noise * (power / (noise_power * 10 ** (snr / 10))) ** 0.5
    peak = float(mixed.abs().max())
    return mixed / peak if peak > 1 else mixed


def make_noise(
    kind: str, samples: int, rng: np.random.Generator, voices: Sequence[Tensor], rate: int = RATE
) -> Tensor:
    """Noise [samples] of one of `KINDS`, from ``rng``.

    babble: four cuts of ``voices`` at once; vehicle: noise whose power falls with frequency above
    60 Hz (6 dB an octave twice over), with a slow swell; music: chords of decaying harmonics.
    """
    if kind == "babble":
        return _babble(samples, rng, voices)
    if kind == "vehicle":
        return _vehicle(samples, rng, rate)
    if kind == "music":
        return _music(samples, rng, rate)
    raise ValueError(f"no noise of kind {kind!r}")


def _babble(samples: int, rng: np.random.Generator, voices: Sequence[Tensor]) -> Tensor:
    total = torch.zeros(samples)
    for _ in range(4):
        voice = voices[int(rng.integers(len(voices)))]
        start = int(rng.integers(len(voice)))
        rolled = torch.cat((voice[start:], voice[:start]))
        total += rolled.repeat(-(-samples // len(rolled)))[:samples]
    return total


def _vehicle(samples: int, rng: np.random.Generator, rate: int) -> Tensor:
    white = torch.from_numpy(rng.standard_normal(samples).astype(np.float32))
    spectrum = torch.fft.rfft(white)
    hertz = torch.linspace(0, rate / 2, len(spectrum))
    shaped = torch.fft.irfft(spectrum / (1 + (hertz / 60.0) ** 2).sqrt(), n=samples)
    swell = 1 + 0.3 * torch.sin(torch.arange(samples) * (2 * torch.pi * float(rng.uniform(0.1, 0.5)) / rate))
    return shaped * swell


def _music(samples: int, rng: np.random.Generator, rate: int) -> Tensor:
    total = torch.zeros(samples)
    length = int(rate * float(rng.uniform(0.25, 0.5)))
    times = torch.arange(length) / rate
    envelope = torch.exp(-3 * times)
    for start in range(0, samples, length):
        root = 110.0 * 2 ** (int(rng.integers(24)) / 12)
        chord = torch.zeros(length)
        for step in (0, 4, 7):
            for harmonic in (1, 2, 3):
                hertz = root * 2 ** (step / 12) * harmonic
                chord += torch.sin(2 * torch.pi * hertz * times) / harmonic
        stop = min(start + length, samples)
        total[start:stop] = (chord * envelope)[: stop - start]
    return total


def spec_augment(
    features_BTF: Tensor, lengths_B: Tensor, cfg: SpecAugmentConfig, generator: torch.Generator
) -> Tensor:
    """A copy of ``features_BTF`` with frequency and time masks, zero (the mean, after CMVN) inside.

    Masks are drawn on the CPU from ``generator``, so that they are the same on every device.
    """
    count, frames, mels = features_BTF.shape
    lengths = lengths_B.cpu()
    masked_BT = _spans(cfg.time_masks, frames, lengths, _widths(cfg, lengths), generator)
    full = torch.full((count,), mels)
    widths = torch.full((count,), min(cfg.freq_width, mels))
    masked_BF = _spans(cfg.freq_masks, mels, full, widths, generator)
    device = features_BTF.device
    masked = masked_BT.to(device)[:, :, None] | masked_BF.to(device)[:, None, :]
    return features_BTF.masked_fill(masked, 0.0)


def _widths(cfg: SpecAugmentConfig, lengths: Tensor) -> Tensor:
    return (lengths * cfg.time_share).long().clamp(max=cfg.time_width)


def _spans(
    masks: int, size: int, lengths: Tensor, widths: Tensor, generator: torch.Generator
) -> Tensor:
    """[B, size] True inside ``masks`` spans, each up to ``widths_B`` wide within ``lengths_B``."""
    place = torch.arange(size)
    inside = torch.zeros(len(lengths), size, dtype=torch.bool)
    for _ in range(masks):
        drawn = torch.rand(2, len(lengths), generator=generator)
        width = (drawn[0] * (widths + 1)).long()
        start = (drawn[1] * (lengths - width + 1).clamp_min(1)).long()
        inside |= (place >= start[:, None]) & (place < (start + width)[:, None])
    return inside
