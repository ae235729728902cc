from dataclasses import replace

import numpy as np
import pytest

from dsasr.evaluation import suite
from dsasr.evaluation.eval_sets import Recording
from dsasr.evaluation.suite import (
    RECORDINGS_ONLY,
    SuiteConfig,
    build_suite,
    spoken_prefix,
    truncated_share,
)
from dsasr.utils.errors import UserError

RATE = 8000


def _recordings(count=4):
    rng = np.random.default_rng(1)
    waves = [(0.1 * rng.standard_normal(4000 + 500 * i)).astype(np.float32) for i in range(count)]
    labels = [("a b c d", "en"), ("你好吗", "zh")] * (count // 2)
    return [
        Recording(f"u{i}", wave, text, lang, "s")
        for i, (wave, (text, lang)) in enumerate(zip(waves, labels, strict=True))
    ]


def _power(x):
    return float(np.mean(np.square(x, dtype=np.float64)))


@pytest.mark.parametrize("snr", [20.0, 5.0, 0.0, -5.0])
def test_mix_has_the_ratio(snr):
    rng = np.random.default_rng(0)
    speech = (0.3 * rng.standard_normal(5000)).astype(np.float32)
    hum = rng.standard_normal(700).astype(np.float32)
    mixed = suite.mix(speech, hum, snr)
    assert np.abs(mixed).max() <= 1
    # Project the speech out: what is left is the noise at its level.
    tiled = np.resize(hum, speech.shape)
    (a, b), *_ = np.linalg.lstsq(np.stack([speech, tiled], 1), mixed, rcond=None)
    ratio = 10 * np.log10(_power(a * speech) / _power(b * tiled))
    assert ratio == pytest.approx(snr, abs=0.01)


def test_mix_with_silence():
    speech = np.ones(10, np.float32) * 0.1
    np.testing.assert_array_equal(suite.mix(speech, np.zeros(3), 5), speech)
    np.testing.assert_array_equal(suite.mix(np.zeros(10, np.float32), speech, 5), np.zeros(10))


@pytest.mark.parametrize("kind", suite.SOUNDS)
def test_sounds(kind):
    speech = [r.wave for r in _recordings()]
    make = lambda seed: suite.SOUNDS[kind](6001, RATE, np.random.default_rng(seed), speech)  # noqa: E731
    wave = make(0)
    assert wave.shape == (6001,) and wave.dtype == np.float32
    assert np.abs(wave).max() <= 1 and np.isfinite(wave).all()
    np.testing.assert_array_equal(wave, make(0))
    assert not np.array_equal(wave, make(1))
    if kind == "silence":
        assert 0 < np.abs(wave).max() <= 2**-15
    else:
        assert _power(wave) ** 0.5 == pytest.approx(0.05, rel=0.05)


def test_music_is_tonal():
    rng = np.random.default_rng(0)
    flatness = {}
    for kind in ("white", "music"):
        power = np.abs(np.fft.rfft(suite.SOUNDS[kind](RATE * 2, RATE, rng))) ** 2 + 1e-12
        flatness[kind] = np.exp(np.log(power).mean()) / power.mean()
    assert flatness["music"] < 0.05 < 0.5 < flatness["white"]


def test_suite_is_reproducible():
    config = SuiteConfig(clips=3, seconds=0.5, snrs=(10.0, 0.0), truncations=(0.25,))
    clips = build_suite(_recordings(), config, rate=RATE)
    by_condition = {}
    for clip in clips:
        by_condition.setdefault(clip.condition, []).append(clip)
    assert {k: len(v) for k, v in by_condition.items()} == {
        **dict.fromkeys(("silence", "white", "babble", "music"), 3),
        **dict.fromkeys(("clean", "snr10", "snr0", "cut25"), 4),
    }
    assert all(c.text is None and len(c.wave) == 0.5 * RATE for c in by_condition["music"])
    # They are in no language; the babble is in two.
    assert {c.lang for kind in suite.SOUNDS for c in by_condition[kind]} == {"und"}
    assert [len(c.wave) for c in by_condition["cut25"]] == [1000, 1125, 1250, 1375]
    again = build_suite(_recordings(), config, rate=RATE)
    assert all(np.array_equal(a.wave, b.wave) for a, b in zip(clips, again, strict=True))
    # The same noise at both levels: only its power differs.
    clean, *noisy = (by_condition[k][0].wave for k in ("clean", "snr10", "snr0"))
    powers = [_power(wave - clean) for wave in noisy]
    assert powers[1] / powers[0] == pytest.approx(10, rel=0.2)


def test_suite_of_speech_and_of_recordings_without_text():
    speech = _recordings(2)[0]
    nonspeech = Recording("bb", speech.wave, "", "en", "s")
    assert [(c.key, c.condition, c.text) for c in build_suite([speech, nonspeech])] == [
        ("u0", "clean", "a b c d"),
        ("bb", "recorded", None),
    ]
    config = SuiteConfig(clips=1, seconds=0.5)
    conditions = [c.condition for c in build_suite([speech, nonspeech], config)]
    sounds = ["silence", "white", "babble", "music"]
    assert conditions == [
        *sounds, "clean", "snr20", "snr10", "snr5", "snr0", "cut50", "recorded"
    ]  # fmt: skip
    # Babble is made of speech.
    without_speech = [c.condition for c in build_suite([nonspeech], config)]
    assert without_speech == ["silence", "white", "music", "recorded"]


@pytest.mark.parametrize("utterances, chosen", [(0, range(4)), (2, (0, 2)), (9, range(4))])
def test_noise_and_cuts_may_be_of_a_few_utterances(utterances, chosen):
    config = SuiteConfig(clips=0, snrs=(10.0,), truncations=(0.5,))
    clips = build_suite(_recordings(), config, rate=RATE, utterances=utterances)
    by_condition = {}
    for clip in clips:
        by_condition.setdefault(clip.condition, []).append(clip.key)
    expected = [f"u{i}" for i in chosen]
    assert by_condition["snr10"] == by_condition["cut50"] == expected
    assert by_condition["clean"] == ["u0", "u1", "u2", "u3"]


def test_only_babble_of_one_language_has_one():
    config = SuiteConfig(clips=2, seconds=0.5, snrs=(), truncations=())
    english = [r for r in _recordings() if r.lang == "en"]
    langs = {c.condition: c.lang for c in build_suite(english, config, rate=RATE)}
    assert langs == {
        "silence": "und", "white": "und", "babble": "en", "music": "und", "clean": "en"
    }  # fmt: skip


def test_truncated_share_parses_the_names_of_the_suite():
    config = SuiteConfig(clips=1, seconds=0.5, snrs=(10.0,), truncations=(0.05, 0.5))
    shares = {
        c.condition: truncated_share(c.condition)
        for c in build_suite(_recordings(), config, rate=RATE)
    }
    truncated = {name: share for name, share in shares.items() if share is not None}
    assert truncated == {"cut5": 0.05, "cut50": 0.5} and len(shares) == 8


def test_suite_refuses():
    for wrong in (
        {"nonspeech": ("rain",)},
        {"noises": ()},
        {"noises": ("silence",)},
        {"truncations": (1.0,)},
    ):
        with pytest.raises(UserError, match=r"noise suite|SuiteConfig\.truncations"):
            SuiteConfig(**wrong)
    with pytest.raises(UserError, match="babble"):
        suite.babble(RATE, RATE, np.random.default_rng(0), [])


@pytest.mark.parametrize(
    ("reference", "hypothesis", "lang", "nearest", "judged"),
    [
        ("a b c d", "a b", "en", "a b", "a b"),
        ("a b c d", "", "en", "", "a b"),
        ("a b c d", "a b c d", "en", "a b c d", "a b c d"),
        ("我们回家吧啊", "我们", "zh", "我 们", "我 们 回"),
        ("", "a", "en", "", ""),
        ("the cat sat on the mat", "please bring fresh water home", "en", "", "the cat sat"),
        ("the cat sat on the mat", "the cat please bring water", "en", "the cat", "the cat sat"),
    ],
)
def test_spoken_prefix(reference, hypothesis, lang, nearest, judged):
    """The nearest prefix alone, and not below half of the units."""
    assert spoken_prefix(reference, hypothesis, lang, 0.0) == nearest
    assert spoken_prefix(reference, hypothesis, lang, 0.5) == judged


def test_channels_are_copies_of_every_utterance():
    config = replace(RECORDINGS_ONLY, channels=("quiet", "padded", "band", "ulaw"))
    recordings = [r for r in _recordings() if r.text]
    clips = build_suite(recordings, config, rate=RATE)
    for r in recordings:
        of = {c.condition: c for c in clips if c.key == r.key}
        assert list(of) == ["clean", "quiet", "padded", "band", "ulaw"]
        assert all(c.text == r.text and c.wave.dtype == np.float32 for c in of.values())
        assert np.allclose(of["quiet"].wave, r.wave * 10 ** (-18 / 20), atol=1e-6)
        assert len(of["padded"].wave) == len(r.wave) + RATE // 2 * 2
        assert np.abs(of["padded"].wave[: RATE // 2]).max() <= 1 / 32768
        assert len(of["band"].wave) == len(of["ulaw"].wave) == len(r.wave)
    with pytest.raises(UserError, match="no channel 'g729'"):
        SuiteConfig(channels=("g729",))
