import numpy as np
import pytest

from dsasr.evaluation import suite as n
from dsasr.utils.errors import UserError

RATE = 8000


def _utterances(count=4):
    rng = np.random.default_rng(1)
    return [
        n.Utterance(f"u{i}", (0.1 * rng.standard_normal(4000 + 500 * i)).astype(np.float32), t, la)
        for i, (t, la) in enumerate([("a b c d", "en"), ("你好吗", "zh")] * (count // 2))
    ]


def _power(x):
    return float(np.mean(np.square(x, dtype=np.float64)))


@pytest.mark.parametrize("snr", [20.0, 5.0, 0.0, -5.0])
def test_mix_has_the_ratio(snr):
    rng = np.random.default_rng(0)
    speech = (0.3 * rng.standard_normal(5000)).astype(np.float32)
    hum = rng.standard_normal(700).astype(np.float32)
    mixed = n.mix(speech, hum, snr)
    assert np.abs(mixed).max() <= 1
    # Project the speech out: what is left is the noise at its level.
    tiled = np.resize(hum, speech.shape)
    (a, b), *_ = np.linalg.lstsq(np.stack([speech, tiled], 1), mixed, rcond=None)
    ratio = 10 * np.log10(_power(a * speech) / _power(b * tiled))
    assert ratio == pytest.approx(snr, abs=0.01)


def test_mix_with_silence():
    speech = np.ones(10, np.float32) * 0.1
    np.testing.assert_array_equal(n.mix(speech, np.zeros(3), 5), speech)
    np.testing.assert_array_equal(n.mix(np.zeros(10, np.float32), speech, 5), np.zeros(10))


@pytest.mark.parametrize("kind", n.SOUNDS)
def test_sounds(kind):
    speech = [u.wave for u in _utterances()]
    make = lambda seed: n.SOUNDS[kind](6001, RATE, np.random.default_rng(seed), speech)  # noqa: E731
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
        power = np.abs(np.fft.rfft(n.SOUNDS[kind](RATE * 2, RATE, rng))) ** 2 + 1e-12
        flatness[kind] = np.exp(np.log(power).mean()) / power.mean()
    assert flatness["music"] < 0.05 < 0.5 < flatness["white"]


def test_suite():
    config = n.SuiteConfig(clips=3, seconds=0.5, snrs=(10.0, 0.0), truncations=(0.25,))
    cases = list(n.suite(_utterances(), config, rate=RATE))
    by = {}
    for case in cases:
        by.setdefault(case.condition, []).append(case)
    assert {k: len(v) for k, v in by.items()} == {
        **dict.fromkeys(("silence", "white", "babble", "music"), 3),
        **dict.fromkeys(("clean", "snr10", "snr0", "cut25"), 4),
    }
    assert all(c.text is None and c.seconds == 0.5 for c in by["music"])
    # No language is heard in them; the babble is of two.
    assert {c.lang for kind in n.SOUNDS for c in by[kind]} == {"und"}
    assert [len(c.wave) for c in by["cut25"]] == [1000, 1125, 1250, 1375]
    again = n.suite(_utterances(), config, rate=RATE)
    assert all(np.array_equal(a.wave, b.wave) for a, b in zip(cases, again, strict=True))
    # The same noise at both levels: the noisier clip minus the speech is the louder.
    extra = [_power(by[k][0].wave - by["clean"][0].wave) for k in ("snr10", "snr0")]
    assert extra[1] / extra[0] == pytest.approx(10, rel=0.2)


def test_only_babble_of_one_language_has_one():
    config = n.SuiteConfig(clips=2, seconds=0.5, snrs=(), truncations=())
    english = [u for u in _utterances() if u.lang == "en"]
    langs = {c.condition: c.lang for c in n.suite(english, config, rate=RATE)}
    assert langs == {
        "silence": "und", "white": "und", "babble": "en", "music": "und", "clean": "en"
    }  # fmt: skip


def test_kept_reads_what_the_suite_names():
    config = n.SuiteConfig(clips=1, seconds=0.5, snrs=(10.0,), truncations=(0.05, 0.5))
    found = {c.condition: n.kept(c.condition) for c in n.suite(_utterances(), config, rate=RATE)}
    cut = {name: share for name, share in found.items() if share is not None}
    assert cut == {"cut5": 0.05, "cut50": 0.5} and len(found) == 8


def test_suite_refuses():
    for wrong in (
        {"nonspeech": ("rain",)},
        {"noises": ()},
        {"noises": ("silence",)},
        {"truncations": (1.0,)},
    ):
        with pytest.raises(UserError, match="noise suite"):
            n.SuiteConfig(**wrong)
    with pytest.raises(UserError, match="babble"):
        list(n.suite([], n.SuiteConfig(clips=1)))
    assert len(list(n.suite([], n.SuiteConfig(clips=1, nonspeech=("white",))))) == 1


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
def test_best_prefix(reference, hypothesis, lang, nearest, judged):
    """The nearest prefix alone, and not below half of the units."""
    assert n.best_prefix(reference, hypothesis, lang, 0.0) == nearest
    assert n.best_prefix(reference, hypothesis, lang, 0.5) == judged
