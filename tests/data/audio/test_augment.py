"""Augmentation of the audio, noise of each kind, and the masks of SpecAugment."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsasr.data.audio.augment import (
    NOISE_KINDS,
    AugmentConfig,
    AugmentParams,
    SpecAugmentConfig,
    augment_wave,
    generate_noise,
    mix,
    spec_augment,
)
from dsasr.data.audio.channel import amplify, band_limit, through_codec
from dsasr.data.dataloader.augment_sampler import AugmentParamColumns, planned_seconds
from dsasr.utils.errors import UserError

RATE = 16_000


def tone(hertz: float, seconds: float = 1.0) -> torch.Tensor:
    return 0.3 * torch.sin(2 * torch.pi * hertz * torch.arange(int(seconds * RATE)) / RATE)


def peak_hertz(wave: torch.Tensor) -> float:
    return int(torch.fft.rfft(wave).abs().argmax()) * RATE / len(wave)


def decibels(power: torch.Tensor) -> float:
    return 10 * float(torch.log10(power))


@pytest.mark.parametrize(
    "bad",
    [{"speeds": ()}, {"speeds": (0.1,)}, {"noise_share": 1.2}, {"snr_std": -1.0},
     {"silence": -1.0}, {"kinds": ()}, {"kinds": ("rain",)}, {"gain_db": (6.0, -6.0)},
     {"codecs": ()}, {"codecs": ("g729",)}, {"band_share": 2.0}],
)  # fmt: skip
def test_impossible_augmentation_is_refused(bad):
    with pytest.raises(UserError, match=r"augment|AugmentConfig"):
        AugmentConfig(**bad)


@pytest.mark.parametrize("bad", [{"freq_masks": -1}, {"time_share": 1.5}, {"time_width": -1}])
def test_impossible_masks_are_refused(bad):
    with pytest.raises(UserError, match="SpecAugmentConfig"):
        SpecAugmentConfig(**bad)


# ------------------------------------------------------------------------------------- the audio


@pytest.mark.parametrize("speed", [0.9, 1.0, 1.1])
def test_speed_changes_tempo_and_pitch(speed):
    wave = tone(1000)
    got = augment_wave(wave, AugmentParams(speed))
    assert abs(len(got) - RATE / speed) < 1
    assert peak_hertz(got) == pytest.approx(1000 * speed, abs=2)
    middle = got[400:-400]
    assert float(middle.square().mean()) == pytest.approx(0.045, rel=0.01)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**63 - 1), st.integers(1, 30_000))
def test_the_duration_is_known_beforehand(seed, samples):
    config = AugmentConfig(noise_share=0.7, silence_share=0.5, codec_share=0.3, band_share=0.3)
    seeds = np.array([seed], np.uint64)
    planned = planned_seconds(config)(np.array([samples / RATE]), seeds)[0]
    params = AugmentParamColumns.sample(config, seeds).row(config, 0, seed)
    augmented = augment_wave(tone(200, 2)[:samples], params)
    assert abs(len(augmented) / RATE - planned) < 3 / RATE
    assert augmented.isfinite().all() and augmented.abs().max() <= 1


@pytest.mark.parametrize("kind", NOISE_KINDS)
@pytest.mark.parametrize("snr", [-5.0, 10.0, 20.0])
def test_noise_covers_the_silence_too_at_its_snr(kind, snr):
    wave = 0.1 * tone(1000)
    params = AugmentParams(1.0, kind, snr, before=0.5, after=0.25, seed=3)
    got = augment_wave(wave, params, voices=[tone(300, 3)])
    assert len(got) == int(1.75 * RATE)
    padded = torch.cat((torch.zeros(8000), wave, torch.zeros(4000)))
    noise = got - padded
    assert decibels(wave.square().mean() / noise.square().mean()) == pytest.approx(snr, abs=0.05)
    assert noise[:8000].abs().max() > 0 and noise[-4000:].abs().max() > 0


def test_equal_parameters_give_equal_audio_and_another_seed_another():
    wave = tone(500)
    for kind in NOISE_KINDS:
        first = augment_wave(wave, AugmentParams(0.9, kind, 5, 0.1, 0.2, 2**40 + 1))
        assert torch.equal(
            first, augment_wave(wave.clone(), AugmentParams(0.9, kind, 5, 0.1, 0.2, 2**40 + 1))
        )
        assert not torch.equal(
            first, augment_wave(wave, AugmentParams(0.9, kind, 5, 0.1, 0.2, 2**40 + 2))
        )
    assert torch.equal(wave, tone(500))  # in place nowhere


def test_a_sum_that_would_clip_is_scaled():
    loud = 3 * tone(1000)
    got = mix(loud, tone(300), -10.0)
    assert float(got.abs().max()) == pytest.approx(1.0)
    assert torch.equal(mix(torch.zeros(9), torch.ones(9), 5.0), torch.zeros(9))  # no speech
    assert torch.equal(mix(tone(9), torch.zeros(RATE), 5.0), tone(9))  # no noise


def test_the_channel_comes_after_the_noise_and_the_level_last():
    wave = tone(1000)
    padded = augment_wave(wave, AugmentParams(before=0.25, after=0.5, seed=4))
    assert len(padded) == RATE + 12_000
    assert float((padded[4000 : 4000 + RATE] - wave).abs().max()) < 0.03
    noisy = AugmentParams(noise="vehicle", snr=0.0, before=0.1, after=0.1, seed=3)
    plain = augment_wave(wave, noisy)
    narrow = augment_wave(wave, dataclasses.replace(noisy, narrow=True))
    assert torch.equal(narrow, band_limit(plain, 8000))
    coded = augment_wave(wave, dataclasses.replace(noisy, narrow=True, codec="ulaw", gain=-12.0))
    assert torch.equal(coded, amplify(through_codec(narrow, "ulaw"), -12.0))
    assert len(coded) == len(plain)
    assert not len(augment_wave(torch.zeros(0), AugmentParams(narrow=True, codec="gsm", gain=6.0)))


def test_gain_changes_the_level_and_nothing_clips():
    wave = tone(440)
    for gain in (-6.0, 6.0):
        louder = augment_wave(wave, AugmentParams(gain=gain))
        assert decibels(louder.square().mean() / wave.square().mean()) == pytest.approx(gain)
    loud = augment_wave(wave, AugmentParams(gain=40.0))
    assert float(loud.abs().max()) == pytest.approx(1.0)
    assert torch.equal(augment_wave(wave, AugmentParams()), wave)
    clipped = 1.5 * wave / wave.abs().max()  # above full scale already, as lossy formats may be
    assert torch.equal(augment_wave(clipped, AugmentParams(gain=3.0)), clipped)
    noisy = AugmentParams(noise="vehicle", snr=10.0, seed=3)
    ratio = augment_wave(wave, dataclasses.replace(noisy, gain=-12.0)) / augment_wave(wave, noisy)
    assert 20 * float(torch.log10(ratio.median())) == pytest.approx(-12.0, abs=1e-3)
    assert not len(augment_wave(torch.zeros(0), AugmentParams(gain=6.0)))


def test_nothing_and_silence_stay_so():
    params = AugmentParams(1.1, "babble", 5, 0.1, 0.1, 1)
    assert len(augment_wave(torch.zeros(0), params)) == 0
    assert not augment_wave(torch.zeros(800), params).any()


def test_recorded_noise_is_taken_as_it_lies():
    recordings = [torch.arange(1.0, 101.0)]
    noise = generate_noise("recorded", 250, np.random.default_rng(1), recordings)
    start = int(noise[0]) - 1
    assert torch.equal(noise, torch.arange(start, start + 250).remainder(100) + 1.0)
    with pytest.raises(ValueError, match="recordings"):
        augment_wave(tone(500), AugmentParams(1.0, "recorded", 5, 0, 0, 1))
    got = augment_wave(
        tone(500), AugmentParams(1.0, "recorded", 5, 0, 0, 1), recordings=[torch.zeros(0), tone(50)]
    )
    assert not torch.equal(got, tone(500))
    assert AugmentConfig(kinds=("recorded", "music")).kinds == ("recorded", "music")


def test_babble_is_several_voices():
    voices = [tone(h, 2) for h in (200, 400, 800, 1600)]
    spectrum = torch.zeros(RATE // 2 + 1)
    for seed in range(8):
        noise = generate_noise("babble", RATE, np.random.default_rng(seed), voices)
        spectrum += torch.fft.rfft(noise).abs()
    assert sorted(spectrum.topk(4).indices.tolist()) == [200, 400, 800, 1600]
    with pytest.raises(ValueError, match="no noise"):
        generate_noise("rain", 9, np.random.default_rng(0), voices)


def test_vehicle_noise_falls_by_six_decibels_an_octave():
    noise = generate_noise("vehicle", 30 * RATE, np.random.default_rng(0), ())
    power = torch.fft.rfft(noise).abs().square()

    def band(hertz):
        per_bin = len(power) / (RATE / 2)
        return power[int(hertz * per_bin) : int(hertz * 1.1 * per_bin)].mean()

    for hertz in (500, 1000, 2000):
        assert decibels(band(hertz) / band(2 * hertz)) == pytest.approx(6.0, abs=1.0)
    assert decibels(band(5) / band(20)) == pytest.approx(0, abs=1.5)


def test_music_is_in_tune():
    noise = generate_noise("music", 4 * RATE, np.random.default_rng(2), ())
    loudest = torch.fft.rfft(noise).abs().topk(12).indices / 4
    semitones = 12 * torch.log2(loudest / 110)
    assert (semitones - semitones.round()).abs().max() < 0.35


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(NOISE_KINDS), st.integers(1, 9000), st.integers(0, 99))
def test_noise_has_the_asked_length_and_power(kind, samples, seed):
    noise = generate_noise(kind, samples, np.random.default_rng(seed), [tone(300)[:77]])
    assert noise.shape == (samples,) and noise.dtype == torch.float32
    assert noise.isfinite().all()
    assert samples < 100 or noise.square().mean() > 0


# ------------------------------------------------------------------------------------- the masks


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.integers(0, 90), min_size=1, max_size=5),
    st.builds(
        SpecAugmentConfig,
        freq_masks=st.integers(0, 3),
        freq_width=st.integers(0, 100),
        time_masks=st.integers(0, 12),
        time_width=st.integers(0, 50),
        time_share=st.floats(0, 1),
    ),
    st.integers(0, 999),
)
def test_masks_are_rows_and_columns_within_bounds(lengths, cfg, seed):
    frames, mels = max(lengths) + 3, 80
    features = torch.rand(len(lengths), frames, mels, generator=generator()) + 1
    got = spec_augment(features, torch.tensor(lengths), cfg, generator(seed))
    hit = got == 0
    assert torch.equal(got[~hit], features[~hit])
    rows, columns = hit.all(2), hit.all(1)
    assert torch.equal(hit, rows[:, :, None] | columns[:, None, :])
    if rows.all(1).any() or columns.all(1).any():
        return  # all is masked: neither kind can be told apart
    for i, length in enumerate(lengths):
        assert not rows[i, length:].any()
        assert rows[i].sum() <= cfg.time_masks * min(cfg.time_width, int(length * cfg.time_share))
        assert columns[i].sum() <= cfg.freq_masks * cfg.freq_width
        edges = (rows[i].int().diff() == 1).sum() + rows[i, 0]
        assert edges <= cfg.time_masks


def test_masks_are_uniform_and_different_for_each_utterance():
    cfg = SpecAugmentConfig(
        freq_masks=1, freq_width=27, time_masks=1, time_width=40, time_share=0.1
    )
    features = torch.ones(4000, 300, 80)
    hit = spec_augment(features, torch.full((4000,), 300), cfg, generator()) == 0
    columns, rows = hit.all(1), hit.all(2)
    widths = columns.sum(1)
    assert (int(widths.min()), int(widths.max())) == (0, 27)
    assert float(widths.double().mean()) == pytest.approx(13.5, abs=0.5)
    assert int(rows.sum(1).max()) == 30  # a tenth of 300 frames, before the limit of 40
    middle = rows[:, 60:240].double().mean(0)
    assert float(middle.std() / middle.mean()) < 0.15
    assert len({tuple(row.tolist()) for row in columns[:50]}) > 40


def test_frames_side_by_side_are_masked_as_frames():
    """Two of 80 bins a row, as w2v-BERT's: a band is masked in both, and a time mask has frames of
    10 ms."""
    cfg = SpecAugmentConfig(freq_masks=1, freq_width=27, time_masks=0)
    rows = torch.ones(500, 100, 160)
    hit = spec_augment(rows, torch.full((500,), 100), cfg, generator(), stack=2) == 0
    assert hit.any() and torch.equal(hit[..., :80], hit[..., 80:])
    cfg = SpecAugmentConfig(freq_masks=0, time_masks=1, time_width=100, time_share=1.0)
    hit = spec_augment(rows, torch.full((500,), 100), cfg, generator(), stack=2) == 0
    masked = hit.reshape(500, 200, 80).all(2).sum(1)
    assert (int(masked.min()), int(masked.max())) == (0, 100)
    # The same as the frames by themselves.
    frames = spec_augment(torch.ones(500, 200, 80), torch.full((500,), 200), cfg, generator())
    assert torch.equal(hit, frames.reshape(rows.shape) == 0)


def test_masks_are_the_generators_alone():
    features = torch.randn(3, 100, 80, generator=generator())
    lengths = torch.tensor([100, 50, 7])
    first = spec_augment(features, lengths, SpecAugmentConfig(), generator(5))
    torch.manual_seed(3)
    assert torch.equal(first, spec_augment(features, lengths, SpecAugmentConfig(), generator(5)))
    assert not torch.equal(
        first, spec_augment(features, lengths, SpecAugmentConfig(), generator(6))
    )
    two = generator(5)
    views = [spec_augment(features, lengths, SpecAugmentConfig(), two) for _ in range(2)]
    assert torch.equal(views[0], first) and not torch.equal(views[0], views[1])


def test_an_empty_batch_has_nothing_to_mask():
    got = spec_augment(
        torch.zeros(0, 0, 80), torch.zeros(0, dtype=torch.long), SpecAugmentConfig(), generator()
    )
    assert got.shape == (0, 0, 80)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_masks_are_the_same_on_a_gpu():
    features, lengths = torch.ones(5, 200, 80), torch.tensor([200, 150, 90, 3, 0])
    here = spec_augment(features, lengths, SpecAugmentConfig(), generator(1))
    there = spec_augment(features.cuda(), lengths, SpecAugmentConfig(), generator(1))
    assert torch.equal(here, there.cpu())


def test_recorded_noise_without_recordings_stops_before_training(tmp_path):
    from dsasr.data.dataloader.dataloader import (
        DataLoaderConfig,
        DatasetConfig,
        StreamingDataLoader,
    )
    from dsasr.data.shards.writer import PackedSample, write_shard

    write_shard(
        tmp_path / "a.tar", [PackedSample("k", "wav", b"RIFF", {"text": "x", "duration": 1.0})]
    )
    with pytest.raises(UserError, match="recorded"):
        StreamingDataLoader(
            DataLoaderConfig(num_workers=0),
            datasets=[DatasetConfig("a", str(tmp_path / "a.tar"))],
            augment=AugmentConfig(kinds=("recorded",)),
        )


@pytest.mark.parametrize("speed", [0.925, 1.037, 0.9, 1.1, 0.333 * 3])
def test_speeds_of_three_decimals_are_what_they_say(speed):
    wave = torch.sin(2 * torch.pi * 300 * torch.arange(32_000) / 16_000)
    fast = augment_wave(wave, AugmentParams(speed=speed))
    assert len(fast) == pytest.approx(32_000 / speed, abs=1.5)
    peak = torch.fft.rfft(fast * torch.hann_window(len(fast))).abs().argmax() * 16_000 / len(fast)
    assert float(peak) == pytest.approx(300 * speed, abs=0.6)
