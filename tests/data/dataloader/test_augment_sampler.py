"""The distributions of the augmentation parameters, and that a sample's seed alone decides them."""

from __future__ import annotations

import hashlib
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsasr.data.audio.augment import NOISE_KINDS, AugmentConfig
from dsasr.data.dataloader.augment_sampler import AugmentParamColumns, planned_seconds
from dsasr.data.dataloader.window_plan import sample_seeds

COUNT = 60_000
SEEDS = sample_seeds(0, 0, "a", "a-000.tar", [str(i) for i in range(COUNT)])


def shares(values: np.ndarray, count: int) -> np.ndarray:
    return np.bincount(values, minlength=count) / len(values)


def test_speeds_noise_and_kinds_come_in_their_shares() -> None:
    config = AugmentConfig()
    params = AugmentParamColumns.sample(config, SEEDS)
    assert set(params.speed.tolist()) == set(config.speeds)
    for speed in config.speeds:
        assert (params.speed == speed).mean() == pytest.approx(1 / 3, abs=0.008)
    assert params.noisy.mean() == pytest.approx(config.noise_share, abs=0.006)
    assert len(NOISE_KINDS) == 3
    kinds = shares(params.kind[params.noisy], 3)
    assert kinds == pytest.approx([1 / 3] * 3, abs=0.015)
    twice = AugmentConfig(kinds=("babble", "babble", "music"))
    kinds = shares(AugmentParamColumns.sample(twice, SEEDS).kind, 3)
    assert kinds == pytest.approx([1 / 3] * 3, abs=0.008)  # named twice, twice as often


def test_snr_is_normal() -> None:
    config = AugmentConfig(snr_mean=7.0, snr_std=4.0)
    snr = AugmentParamColumns.sample(config, SEEDS).snr
    z = (snr - 7.0) / 4.0
    assert (z.mean(), z.std()) == (pytest.approx(0, abs=0.015), pytest.approx(1, abs=0.01))
    assert (z**3).mean() == pytest.approx(0, abs=0.04)
    assert (z**4).mean() == pytest.approx(3, abs=0.12)
    for limit, share in ((-1.96, 0.025), (-1.0, 0.1587), (0.0, 0.5), (1.0, 0.8413)):
        assert (z < limit).mean() == pytest.approx(share, abs=0.008)


def test_silence_is_beta_and_only_around_noisy_samples() -> None:
    config = AugmentConfig(noise_share=0.6, silence=2.0)
    params = AugmentParamColumns.sample(config, SEEDS)
    for side in (params.before, params.after):
        assert not side[~params.noisy].any()
        x = side[params.noisy] / config.silence
        assert x.min() >= 0 and x.max() <= 1
        # Beta(1, 3): mean 1/4, variance 3/80, distribution 1 − (1 − x)³
        assert x.mean() == pytest.approx(1 / 4, abs=0.005)
        assert x.var() == pytest.approx(3 / 80, abs=0.001)
        for limit in (0.1, 0.25, 0.5, 0.75):
            assert (x < limit).mean() == pytest.approx(1 - (1 - limit) ** 3, abs=0.012)


def test_silence_without_noise_level_band_and_codecs_come_in_their_shares() -> None:
    config = AugmentConfig(
        noise_share=0.3, silence_share=0.5, gain_db=(-20.0, 6.0), band_share=0.1, codec_share=0.4,
        codecs=("ulaw", "mp3"),
    )  # fmt: skip
    params = AugmentParamColumns.sample(config, SEEDS)
    padded = params.before > 0
    assert padded[params.noisy].all()
    assert padded[~params.noisy].mean() == pytest.approx(0.5, abs=0.01)
    for side in (params.before, params.after):  # evenly, so that both are long in a quarter
        alone = side[padded & ~params.noisy]
        assert (alone.mean(), alone.var()) == pytest.approx((0.5, 1 / 12), abs=0.01)
    assert params.gain.min() == pytest.approx(-20, abs=0.05)
    assert params.gain.max() == pytest.approx(6, abs=0.05)
    assert (params.gain.mean(), params.gain.var()) == pytest.approx((-7, 26**2 / 12), abs=0.8)
    assert params.narrow.mean() == pytest.approx(0.1, abs=0.006)
    assert params.coded.mean() == pytest.approx(0.4, abs=0.01)
    assert shares(params.codec[params.coded], 2) == pytest.approx([0.5, 0.5], abs=0.015)
    rows = [params.row(config, i, int(SEEDS[i])) for i in range(200)]
    assert {row.codec for row in rows} == {None, "ulaw", "mp3"}
    assert {row.narrow for row in rows} == {False, True}
    plain = AugmentParamColumns.sample(AugmentConfig(), SEEDS)
    assert not (plain.gain.any() or plain.narrow.any() or plain.coded.any())
    # What was drawn before there were these stays as it was.
    quiet = AugmentParamColumns.sample(AugmentConfig(noise_share=0.3), SEEDS)
    for name in ("speed", "noisy", "kind", "snr"):
        assert np.array_equal(getattr(quiet, name), getattr(params, name))


def test_the_draws_of_a_sample_are_independent() -> None:
    params = AugmentParamColumns.sample(AugmentConfig(noise_share=1.0), SEEDS)
    columns = (params.speed, params.before, params.after, params.kind, params.snr)
    correlation = np.corrcoef(np.stack(columns)) - np.eye(len(columns))
    assert np.abs(correlation).max() < 0.02
    half = AugmentParamColumns.sample(AugmentConfig(noise_share=0.5), SEEDS)
    for column in (half.speed, half.kind, half.snr):
        assert abs(np.corrcoef(half.noisy, column)[0, 1]) < 0.02


def test_a_row_depends_on_its_seed_alone() -> None:
    config = AugmentConfig(noise_share=0.5)
    seeds = SEEDS[:50]
    together = AugmentParamColumns.sample(config, seeds)
    for i, seed in enumerate(seeds.tolist()):
        alone = AugmentParamColumns.sample(config, seeds[i : i + 1])
        assert alone.row(config, 0, seed) == together.row(config, i, seed)


def test_the_parameters_are_the_same_in_every_release() -> None:
    """A resumed run repeats its samples, so these values must never change."""
    config = AugmentConfig()
    params = AugmentParamColumns.sample(config, np.arange(0, 900, 9, dtype=np.uint64))
    exact = np.concatenate((params.speed, params.noisy, params.kind)).tobytes()
    assert hashlib.sha256(exact).hexdigest()[:16] == "26f513c2f2e63901"
    row = params.row(config, 8, 72)
    assert (row.speed, row.noise, row.seed) == (1.1, "vehicle", 72)
    floats = (13.112976868636094, 0.6134074500012348, 0.5483553399660352)
    assert (row.snr, row.before, row.after) == pytest.approx(floats, rel=1e-14)  # libm's last bit


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.floats(0.1, 40.0), min_size=1, max_size=20),
    st.builds(
        AugmentConfig,
        speeds=st.sampled_from([(1.0,), (0.9, 1.0, 1.1), (0.5, 2.0)]),
        noise_share=st.floats(0, 1),
        silence=st.floats(0, 3),
    ),
)
def test_planned_seconds_are_those_of_the_rows(durations, config) -> None:
    seeds = SEEDS[: len(durations)]
    planned = planned_seconds(config)(np.array(durations), seeds)
    columns = AugmentParamColumns.sample(config, seeds)
    for i, seconds in enumerate(durations):
        row = columns.row(config, i, int(seeds[i]))
        expected = seconds / row.speed + row.before + row.after
        assert planned[i] == pytest.approx(expected, rel=1e-12)
        assert planned[i] <= seconds / min(config.speeds) + 2 * config.silence


def test_a_draw_is_cheap() -> None:
    config, best = AugmentConfig(), 1.0
    for _ in range(5):
        started = time.process_time()
        AugmentParamColumns.sample(config, SEEDS)
        best = min(best, (time.process_time() - started) / COUNT)
    assert best < 1e-5  # 1e-6 on an idle core
