"""Decoding, resampling and filter banks against closed forms, kaldi and float64."""

import io
import math
import time

import numpy as np
import pytest
import soundfile
import torch
import torchaudio.functional
from hypothesis import given, settings
from hypothesis import strategies as st
from torchaudio.compliance import kaldi

from dsasr.data.audio.decoding import decode
from dsasr.data.audio.features import Cmvn, CmvnSums, FbankConfig, fbank, fbank_batch
from dsasr.data.audio.files import AudioError
from dsasr.data.audio.resampling import resample
from dsasr.utils.errors import UserError

RATE = 16_000


def tone(hertz: float, seconds: float, rate: int = RATE) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * hertz * np.arange(int(seconds * rate)) / rate)


def encoded(wave: np.ndarray, rate: int = RATE, form: str = "WAV", subtype=None) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, wave, rate, format=form, subtype=subtype)
    return buffer.getvalue()


def speech(samples: int, seed: int = 0) -> torch.Tensor:
    """Noise shaped like speech: most of it low, some quiet stretches; of 16 bits."""
    rng = np.random.default_rng(seed)
    wave = np.convolve(rng.standard_normal(samples + 7), np.ones(8) / 8, "valid")
    wave *= 0.02 + 0.2 * np.abs(np.sin(np.arange(samples) / 3000))
    return torch.from_numpy(np.rint(wave * 32768).clip(-32768, 32767) / 32768).float()


# ------------------------------------------------------------------------------------- decoding


@pytest.mark.parametrize(
    ("form", "subtype", "tolerance"),
    [("WAV", "PCM_16", 2e-4), ("FLAC", "PCM_16", 2e-4), ("WAV", "FLOAT", 1e-6),
     ("OGG", "OPUS", 0.2), ("OGG", "VORBIS", 0.1), ("MP3", None, 0.1)],
)  # fmt: skip
def test_formats(form, subtype, tolerance):
    wave = tone(440, 1.0)
    got = decode(encoded(wave, form=form, subtype=subtype))
    assert got.dtype == torch.float32 and got.shape == (RATE,)
    # Lossy coders need a moment to start; the middle must be the tone.
    assert np.abs(got.numpy() - wave)[4000:12000].max() < tolerance


@pytest.mark.parametrize("rate", [8000, 11_025, 22_050, 24_000, 44_100, 48_000, 96_000])
def test_any_rate_becomes_16_khz(rate):
    got = decode(encoded(tone(440, 1.0, rate), rate, subtype="FLOAT")).numpy()
    assert len(got) == RATE
    assert np.abs(got - tone(440, 1.0))[200:-200].max() < 2e-3


def test_what_lies_above_half_the_rate_is_gone():
    got = decode(encoded(tone(11_000, 1.0, 48_000), 48_000, subtype="FLOAT"))
    assert got[200:-200].abs().max() < 0.02


@pytest.mark.parametrize("channels", [2, 3, 8])
def test_channels_are_averaged(channels):
    wave = np.random.default_rng(0).uniform(-1, 1, (70_000, channels)).astype(np.float32)
    got = decode(encoded(wave, subtype="FLOAT"))
    assert torch.allclose(got, torch.from_numpy(wave.mean(1)), atol=1e-6)


def cause(data: bytes, **limits) -> str:
    with pytest.raises(AudioError) as caught:
        decode(data, **limits)
    return caught.value.cause


def test_bad_audio_is_named():
    wave = tone(440, 2.0)
    assert cause(b"") == cause(b"RIFF") == cause(b"\0" * 5000) == "decode_error"
    assert cause(encoded(np.zeros(0))) == "empty_audio"
    for value in (np.nan, np.inf):
        hurt = wave.copy()
        hurt[777] = value
        assert cause(encoded(hurt, subtype="FLOAT")) == "nan_audio"
        assert cause(encoded(np.stack([hurt, wave], 1), subtype="FLOAT")) == "nan_audio"
    assert cause(encoded(wave), max_seconds=1.9) == "too_long"
    assert len(decode(encoded(wave), max_seconds=2.0)) == 2 * RATE
    start = decode(encoded(wave, form="FLAC"), max_seconds=0.5, cut=True)
    assert torch.equal(start, decode(encoded(wave, form="FLAC"))[: RATE // 2])
    assert cause(encoded(np.zeros((100, 100)))) == "decode_error"  # channels
    assert cause(encoded(wave, 500)) == "decode_error"  # sampling rate


@pytest.mark.parametrize("form", ["FLAC", "OGG", "MP3"])
def test_half_a_file_is_not_taken_for_a_short_one(form):
    data = bytearray(encoded(speech(5 * RATE).numpy(), form=form))
    middle = len(data) // 2
    data[middle : middle + 2000] = bytes(2000)
    if form == "MP3":  # its decoder finds its feet again: as long as before, or named
        try:
            assert len(decode(bytes(data))) > 4.9 * RATE
        except AudioError as error:
            assert error.cause in ("truncated_audio", "decode_error")
    else:
        assert cause(bytes(data)) == "decode_error"


def test_a_header_that_claims_hours_costs_nothing():
    hours = encoded(np.zeros(RATE * 3600, np.int16), form="FLAC")  # an hour in few kilobytes
    assert len(hours) < 200_000
    started = time.process_time()
    assert cause(hours) == "too_long"
    assert time.process_time() - started < 1
    data = bytearray(encoded(tone(440, 1.0)))
    data[40:44] = (0x7FFFFFFF).to_bytes(4, "little")  # a data chunk of 2 GB
    assert len(decode(bytes(data), max_seconds=1e5)) == RATE  # what is there is what counts


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_damage_raises_audio_errors_only(data):
    form = data.draw(st.sampled_from(["WAV", "FLAC", "OGG"]))
    hurt = bytearray(encoded(tone(300, 0.3), form=form))
    for _ in range(data.draw(st.integers(1, 5))):
        hurt[data.draw(st.integers(0, len(hurt) - 1))] = data.draw(st.integers(0, 255))
    hurt = hurt[: data.draw(st.integers(0, len(hurt)))]
    try:
        wave = decode(bytes(hurt))
    except AudioError as error:
        named = "decode_error", "empty_audio", "nan_audio", "too_long", "truncated_audio"
        assert error.cause in (*named, "out_of_scale", "antiphase")
    else:
        assert wave.isfinite().all() and 0 < len(wave) <= 61 * RATE


# ----------------------------------------------------------------------------------- resampling


@pytest.mark.parametrize(
    ("source", "target"), [(90, 100), (110, 100), (8000, 16000), (44_100, 16_000), (16_000, 11_025)]
)
@pytest.mark.parametrize("samples", [1, 7, 401, 16_000])
def test_resampling_is_torchaudios(source, target, samples):
    wave = speech(samples)
    # In float64: torchaudio makes its kernel in the wave's type, and in float32 is off by 2e-5.
    expected = torchaudio.functional.resample(wave.double(), source, target)
    got = resample(wave, source, target)
    assert got.shape == expected.shape
    assert (got - expected).abs().max() < 1e-6


@pytest.mark.parametrize("source", [44_056, 12_347, 16_001, 15_999, 191_999, 1009])
def test_odd_rates_make_small_kernels(source):
    from dsasr.data.audio.resampling import _resample_kernel

    kernel, reduced, target, _ = _resample_kernel(source, RATE)
    assert kernel.numel() < 1.2e6
    assert reduced / target == pytest.approx(source / RATE, rel=5e-4)
    got = resample(torch.from_numpy(tone(200, 0.5, source)).float(), source, RATE)
    expected = tone(200, 0.5)[: len(got)]
    assert abs(len(got) - RATE // 2) <= 2 * max(1, RATE // source)
    assert np.abs(got.numpy()[400:-400] - expected[400 : len(got) - 400]).max() < 0.02


# --------------------------------------------------------------------------------- filter banks


def kaldi_float64(wave: torch.Tensor, cfg: FbankConfig) -> torch.Tensor:
    """kaldi's features step by step in float64: the definition."""
    x = wave.double().numpy() * 32768
    size = 1 << (cfg.window - 1).bit_length()
    mel = lambda hertz: 1127.0 * np.log(1 + hertz / 700.0)  # noqa: E731
    edges = np.linspace(mel(cfg.low_hz), mel(cfg.rate / 2), cfg.mels + 2)
    bins = mel(np.arange(size // 2) * cfg.rate / size)
    window = (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(cfg.window) / (cfg.window - 1))) ** 0.85
    rows = []
    for t in range(cfg.frames(len(x))):
        frame = x[t * cfg.shift : t * cfg.shift + cfg.window]
        frame = frame - frame.mean()
        frame = frame - 0.97 * np.concatenate((frame[:1], frame[:-1]))
        power = np.abs(np.fft.rfft(frame * window, size)[: size // 2]) ** 2
        row = []
        for left, center, right in zip(edges, edges[1:], edges[2:], strict=False):
            weight = np.minimum((bins - left) / (center - left), (right - bins) / (right - center))
            row.append(power @ weight.clip(0))
        rows.append(np.log(np.maximum(row, np.finfo(np.float32).eps)))
    return torch.from_numpy(np.array(rows).reshape(-1, cfg.mels))


CONFIGS = [
    FbankConfig(),
    FbankConfig(mels=40),
    FbankConfig(mels=23, rate=8000),
    FbankConfig(mels=80, frame_ms=32, shift_ms=8, low_hz=0),
    FbankConfig(mels=1),
    FbankConfig(mels=3),
]


@pytest.mark.parametrize("cfg", CONFIGS, ids=str)
@pytest.mark.parametrize("samples", [400, 401, 559, 560, 16_037])
def test_fbank_is_kaldis_to_a_thousandth(cfg, samples):
    wave = speech(samples, samples)
    got = fbank(wave, cfg)
    assert got.dtype == torch.float32 and got.shape == (cfg.frames(samples), cfg.mels)
    assert (got - kaldi_float64(wave, cfg)).abs().max().item() < 1e-3 if len(got) else True
    batch, lengths = fbank_batch(wave[None], torch.tensor([samples]), cfg)
    assert lengths.tolist() == [len(got)]
    assert torch.allclose(batch[0], got, atol=1e-3)


@pytest.mark.parametrize("cfg", CONFIGS[:3], ids=str)
def test_fbank_is_torchaudios_and_kaldi_native_fbanks(cfg):
    wave = speech(3 * cfg.rate) + 0.05  # with a constant to be taken off
    theirs = kaldi.fbank(
        wave.double()[None] * 32768, num_mel_bins=cfg.mels, sample_frequency=cfg.rate, dither=0.0
    )
    assert (fbank(wave, cfg) - theirs).abs().max() < 1e-3
    native = pytest.importorskip("kaldi_native_fbank")
    options = native.FbankOptions()
    options.frame_opts.dither, options.frame_opts.samp_freq = 0.0, cfg.rate
    options.mel_opts.num_bins = cfg.mels
    computer = native.OnlineFbank(options)
    computer.accept_waveform(cfg.rate, (wave * 32768).tolist())
    computer.input_finished()
    frames = [computer.get_frame(i) for i in range(computer.num_frames_ready)]
    # In float32 throughout, its own error reaches a thousandth.
    assert (fbank(wave, cfg) - torch.from_numpy(np.stack(frames))).abs().max() < 3e-3


def test_digital_silence_is_the_floor():
    got = fbank(torch.zeros(1600), FbankConfig())
    assert torch.equal(got, torch.full((8, 80), math.log(torch.finfo(torch.float32).eps)))


@pytest.mark.parametrize("samples", [0, 1, 399])
def test_less_than_a_window_has_no_frames(samples):
    assert fbank(torch.zeros(samples), FbankConfig()).shape == (0, 80)
    batch, lengths = fbank_batch(torch.zeros(2, samples), torch.tensor([samples, 0]), FbankConfig())
    assert batch.shape == (2, 0, 80) and lengths.tolist() == [0, 0]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 5000), min_size=1, max_size=6), st.integers(0, 99))
def test_a_batch_is_its_utterances_whatever_pads_them(lengths, seed):
    cfg = FbankConfig()
    waves = [speech(n, seed + i) if n else torch.zeros(0) for i, n in enumerate(lengths)]
    padded = torch.full((len(waves), max(lengths) + 13), 0.3)  # padding must not matter
    for row, wave in zip(padded, waves, strict=True):
        row[: len(wave)] = wave
    batch, frames = fbank_batch(padded, torch.tensor(lengths), cfg)
    for i, wave in enumerate(waves):
        own = fbank(wave, cfg)
        assert frames[i] == len(own)
        assert torch.allclose(batch[i, : len(own)], own, atol=1e-3)
        assert not batch[i, len(own) :].any()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_fbank_on_the_gpu():
    waves, cfg = torch.stack([speech(32_000, i) for i in range(4)]), FbankConfig()
    lengths = torch.tensor([32_000, 20_000, 400, 0])
    there, frames = fbank_batch(waves.cuda(), lengths.cuda(), cfg)
    here, expected = fbank_batch(waves, lengths, cfg)
    assert torch.equal(frames.cpu(), expected)
    assert (there.cpu() - here).abs().max() < 1e-3


def test_dither_is_the_audios_own():
    wave, cfg = speech(16_000), FbankConfig(dither=1.0)
    torch.manual_seed(1)
    first = fbank(wave, cfg)
    torch.manual_seed(2)
    assert torch.equal(fbank(wave.clone(), cfg), first)
    assert not torch.equal(first, fbank(wave, FbankConfig()))
    silence = fbank(torch.zeros(16_000), cfg)
    assert silence.isfinite().all() and silence.mean() > -5
    with pytest.raises(UserError, match="dither"):
        fbank_batch(wave[None], torch.tensor([16_000]), cfg)


@pytest.mark.parametrize(
    "bad",
    [{"mels": 0}, {"rate": 10}, {"shift_ms": 0.0}, {"shift_ms": 30.0}, {"dither": -1.0},
     {"low_hz": 9000.0}, {"shift_ms": 0.01}],
)  # fmt: skip
def test_impossible_fbanks_are_refused(bad):
    with pytest.raises(UserError):
        FbankConfig(**bad)


def test_real_recordings_have_kaldis_features(recordings):
    paths = sorted(recordings.glob("*/audio/*/*"))[::100]
    assert len(paths) > 20
    beyond, bins = 0, 0
    for path in paths:
        wave = decode(path.read_bytes())
        theirs = kaldi.fbank(
            wave.double()[None] * 32768, num_mel_bins=80, sample_frequency=16_000, dither=0.0
        )
        loud = theirs > theirs.max(1, keepdim=True).values - 12
        batch, _ = fbank_batch(wave[None], torch.tensor([len(wave)]), FbankConfig())
        for got in (fbank(wave, FbankConfig()), batch[0]):
            error = (got - theirs).abs()
            assert error[loud].max() < 1e-3
            # Further than 12 nats below the frame's loudest bin, float32 itself is at its end.
            assert error.max() < 0.02
            beyond, bins = beyond + int((error > 1e-3).sum()), bins + error.numel()
    assert beyond < 3e-4 * bins


# ------------------------------------------------------------------------------ mean and variance


def test_cmvn_is_numpys_over_all_frames(tmp_path):
    parts = [fbank(speech(n, n), FbankConfig()) for n in (400, 8000, 16_000)]
    together = torch.cat(parts).double().numpy()
    cmvn = Cmvn.accumulate(parts, 80)
    assert np.allclose(cmvn.mean_F, together.mean(0), rtol=1e-12)
    assert np.allclose(cmvn.std_F, together.std(0), rtol=1e-9)
    applied = cmvn.apply(torch.cat(parts))
    assert applied.mean(0).abs().max() < 1e-4 and (applied.std(0, False) - 1).abs().max() < 1e-4
    cmvn.save(tmp_path / "c.json")
    loaded = Cmvn.load(tmp_path / "c.json")
    assert torch.equal(loaded.mean_F, cmvn.mean_F) and torch.equal(loaded.std_F, cmvn.std_F)
    assert loaded.frames == len(together)


@settings(max_examples=20, deadline=None)
@given(st.permutations(range(5)), st.integers(0, 5))
def test_sums_merge_in_any_grouping(order, cut):
    parts = [torch.randn(7 + i, 3, generator=torch.Generator().manual_seed(i)) for i in range(5)]
    left, right, all_of_them = CmvnSums(3), CmvnSums(3), CmvnSums(3)
    for position, i in enumerate(order):
        (left if position < cut else right).update(parts[i])
        all_of_them.update(parts[i])
    left.merge(right)
    assert torch.allclose(left.result().mean_F, all_of_them.result().mean_F, rtol=1e-13, atol=1e-15)
    assert torch.allclose(left.result().std_F, all_of_them.result().std_F, rtol=1e-12)
    assert left.count == all_of_them.count


def test_a_constant_bin_does_not_divide_by_zero():
    assert Cmvn.accumulate([torch.ones(9, 2)], 2).apply(torch.ones(1, 2)).isfinite().all()
    with pytest.raises(UserError, match="no frames"):
        CmvnSums(2).result()


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"mean": [1], "std": [0], "frames": 1}', '{"mean": [1], "std": ["x"]}',
     '{"mean": [1, 2], "std": [1], "frames": 1}', '{"mean": [NaN], "std": [1], "frames": 1}',
     '{"mean": [[1]], "std": [[1]], "frames": 1}'],
)  # fmt: skip
def test_damaged_cmvn_files_are_named(tmp_path, text):
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(UserError, match=r"c\.json"):
        Cmvn.load(tmp_path / "c.json")
    with pytest.raises(UserError, match=r"none\.json"):
        Cmvn.load(tmp_path / "none.json")
