"""What chance decides about a sample, from its planned seed: known before any audio is read."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dsasr.data.audio.augment import AugmentConfig, Draw
from dsasr.data.dataloader.bucketing import Lengths, uniform

# One salt for each of a sample's draws.
SPEED, NOISY, KIND, SNR_RADIUS, SNR_ANGLE, BEFORE, AFTER = range(1, 8)


@dataclass(frozen=True)
class Draws:
    """`augment.Draw` in columns, for many samples at once; the planner draws every sample's.

    At 1 µs a sample instead of 20, so that each of many ranks can plan the whole epoch.
    """

    speed: np.ndarray
    noisy: np.ndarray
    before: np.ndarray  # seconds of silence
    after: np.ndarray
    kind: np.ndarray
    snr: np.ndarray

    @classmethod
    def of(cls, config: AugmentConfig, seeds: np.ndarray) -> Draws:
        """A function of each seed alone: Beta(1, 3) by inversion, the normal by Box and Muller."""
        speeds = np.asarray(config.speeds)
        radius = np.sqrt(-2 * np.log1p(-uniform(seeds, SNR_RADIUS)))
        normal = radius * np.cos(2 * np.pi * uniform(seeds, SNR_ANGLE))
        noisy = uniform(seeds, NOISY) < config.noise_share
        before, after = (
            np.where(noisy, config.silence * (1 - np.cbrt(1 - uniform(seeds, salt))), 0.0)
            for salt in (BEFORE, AFTER)
        )
        return cls(
            speed=speeds[(uniform(seeds, SPEED) * len(speeds)).astype(np.int64)],
            noisy=noisy,
            before=before,
            after=after,
            kind=(uniform(seeds, KIND) * len(config.kinds)).astype(np.int64),
            snr=config.snr_mean + config.snr_std * normal,
        )

    def seconds(self, durations: np.ndarray) -> np.ndarray:
        """Durations after augmentation."""
        return durations / self.speed + self.before + self.after

    def one(self, config: AugmentConfig, i: int, seed: int) -> Draw:
        return Draw(
            speed=float(self.speed[i]),
            noise=config.kinds[int(self.kind[i])] if self.noisy[i] else None,
            snr=float(self.snr[i]),
            before=float(self.before[i]),
            after=float(self.after[i]),
            seed=seed,
        )


def planned_seconds(config: AugmentConfig) -> Lengths:
    """(seconds, seeds) → seconds after augmentation, for the planner."""
    return lambda durations, seeds: Draws.of(config, seeds).seconds(durations)
