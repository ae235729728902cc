"""Augmentation parameters of samples, drawn from their planned seeds before any audio is read.

This is the only sampler of the distributions that `AugmentConfig` describes. It works on columns,
at 1 µs a sample, so that each of many ranks can plan the whole epoch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dsasr.data.audio.augment import AugmentConfig, AugmentParams
from dsasr.data.dataloader.window_plan import AugmentedDurations, uniform

# One salt for each of a sample's draws.
SPEED, NOISY, KIND, SNR_RADIUS, SNR_ANGLE, BEFORE, AFTER = range(1, 8)
PADDED, GAIN, NARROW, CODED, CODEC = range(8, 13)


@dataclass(frozen=True)
class AugmentParamColumns:
    """`AugmentParams` of N samples in columns [N]. ``kind`` and ``snr`` count where ``noisy``, and
    ``codec`` where ``coded``."""

    speed: np.ndarray
    noisy: np.ndarray
    before: np.ndarray  # seconds of silence
    after: np.ndarray
    kind: np.ndarray  # index into the config's ``kinds``
    snr: np.ndarray  # dB
    gain: np.ndarray  # dB
    narrow: np.ndarray
    coded: np.ndarray
    codec: np.ndarray  # index into the config's ``codecs``

    @classmethod
    def sample(cls, config: AugmentConfig, seeds: np.ndarray) -> AugmentParamColumns:
        """One row for each of ``seeds`` [N] (uint64), a function of that seed alone.

        Beta(1, 3) by inversion of its distribution 1 − (1 − x)³, the normal by Box and Muller.
        """

        def silence(salt: int) -> np.ndarray:
            even = uniform(seeds, salt)
            return config.silence * np.where(
                noisy, 1 - np.cbrt(1 - even), np.where(padded, even, 0)
            )

        speeds = np.asarray(config.speeds)
        radius = np.sqrt(-2 * np.log1p(-uniform(seeds, SNR_RADIUS)))
        normal = radius * np.cos(2 * np.pi * uniform(seeds, SNR_ANGLE))
        noisy = uniform(seeds, NOISY) < config.noise_share
        padded = noisy | (uniform(seeds, PADDED) < config.silence_share)
        low, high = config.gain_db
        return cls(
            speed=speeds[(uniform(seeds, SPEED) * len(speeds)).astype(np.int64)],
            noisy=noisy,
            before=silence(BEFORE),
            after=silence(AFTER),
            kind=(uniform(seeds, KIND) * len(config.kinds)).astype(np.int64),
            snr=config.snr_mean + config.snr_std * normal,
            gain=low + (high - low) * uniform(seeds, GAIN),
            narrow=uniform(seeds, NARROW) < config.band_share,
            coded=uniform(seeds, CODED) < config.codec_share,
            codec=(uniform(seeds, CODEC) * len(config.codecs)).astype(np.int64),
        )

    def seconds(self, durations: np.ndarray) -> np.ndarray:
        """Durations [N] in seconds after augmentation."""
        return durations / self.speed + self.before + self.after

    def row(self, config: AugmentConfig, i: int, seed: int) -> AugmentParams:
        """The parameters of sample ``i``, whose planned seed is ``seed``."""
        return AugmentParams(
            speed=float(self.speed[i]),
            noise=config.kinds[int(self.kind[i])] if self.noisy[i] else None,
            snr=float(self.snr[i]),
            before=float(self.before[i]),
            after=float(self.after[i]),
            seed=seed,
            narrow=bool(self.narrow[i]),
            codec=config.codecs[int(self.codec[i])] if self.coded[i] else None,
            gain=float(self.gain[i]),
        )


def planned_seconds(config: AugmentConfig) -> AugmentedDurations:
    """(durations [N] in seconds, seeds [N]) → durations after augmentation, for the sampler."""
    return lambda durations, seeds: AugmentParamColumns.sample(config, seeds).seconds(durations)
