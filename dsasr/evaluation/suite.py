"""The noise suite of an evaluation: non-speech, noisy speech and truncated speech.

Everything is synthesized from a seed and, for babble and noisy speech, from the recordings of the
evaluation set; the same seed gives the same suite for every system. Waves are float32 [n], mono, in
[−1, 1]. The sounds are **ours**. They are not the training's (`dsasr.data.audio.augment`), on
purpose: a system trained with augmentation is evaluated on noise that it was not trained on. They
stay as they are, so that results of different releases compare.

A clip's condition is ``clean``, ``snr20``… (dB), ``cut50``… (percent of the audio that remains),
a channel (``quiet``, ``band``…),
the name of a synthesized sound, or ``recorded``: non-speech of the evaluation set (recordings
without text). SNR is 10·log₁₀ of the ratio of mean powers, in dB, over the whole clip.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated

import numpy as np
import torch
from rapidfuzz.distance import Levenshtein

from dsasr.data.audio import channel
from dsasr.evaluation.eval_sets import Recording
from dsasr.evaluation.normalize import units
from dsasr.utils import ranges
from dsasr.utils.errors import UserError
from dsasr.utils.ranges import Decibels, NonNegativeInt, Range

CLEAN, RECORDED = "clean", "recorded"  # conditions
CHANNELS = ("quiet", "padded", "band", *channel.CODECS)
USUAL_CHANNELS = ("quiet", "padded", "band", "ulaw", "mp3")  # of `dsasr evaluate --suite`
_LEVEL = 0.05  # RMS of synthesized sounds: −26 dB of full scale, a usual speech level
_UNDETERMINED = "und"  # ISO 639-2's tag of what is in no language


@dataclass(frozen=True)
class SuiteConfig:
    """``clips`` of ``seconds`` each per kind of ``nonspeech``; every utterance at each of ``snrs``
    (dB) with one of ``noises``, and truncated to each share of ``truncations``."""

    clips: NonNegativeInt = 10  # non-speech clips of each kind
    seconds: Annotated[float, Range(0, 3600, above=True)] = 10.0  # length of a non-speech clip
    # kinds of non-speech: silence, white, babble, music
    nonspeech: tuple[str, ...] = ("silence", "white", "babble", "music")
    # signal-to-noise ratios in dB at which every utterance is tested
    snrs: tuple[Decibels, ...] = (20.0, 10.0, 5.0, 0.0)
    noises: tuple[str, ...] = ("white", "babble", "music")  # noises mixed in: white, babble, music
    # shares of an utterance, from its start, that truncated copies keep
    truncations: tuple[Annotated[float, Range(0, 1, above=True, below=True)], ...] = (0.5,)
    # what lies between speaker and file, one copy of every utterance each: quiet (18 dB less),
    # padded (half a second of silence on both sides), band (8 kHz sampling), ulaw, gsm, mp3, opus
    channels: tuple[str, ...] = ()
    seed: NonNegativeInt = 0  # of the noise

    def __post_init__(self) -> None:
        ranges.check(self)
        for kind in (*self.nonspeech, *self.noises):
            if kind not in SOUNDS:
                raise UserError(f"noise suite: no sound {kind!r}; there are {', '.join(SOUNDS)}")
        if self.snrs and (not self.noises or "silence" in self.noises):
            raise UserError("noise suite: snrs need noises, and silence is none")
        if unknown := [name for name in self.channels if name not in CHANNELS]:
            raise UserError(
                f"noise suite: no channel {unknown[0]!r}; there are {', '.join(CHANNELS)}"
            )


# A suite of the recordings as they are.
RECORDINGS_ONLY = SuiteConfig(nonspeech=(), snrs=(), noises=(), truncations=())


@dataclass(frozen=True)
class SuiteClip:
    """One clip to transcribe. ``wave`` is float32 [n]; ``text`` is None for non-speech.

    Of truncated speech ``text`` is the whole reference: see `spoken_prefix`. ``lang`` of
    synthesized non-speech is ``und``, but of babble in one language that language.
    """

    key: str
    condition: str
    wave: np.ndarray = field(repr=False)
    text: str | None
    lang: str
    speaker: str = ""


def build_suite(
    recordings: Sequence[Recording],
    config: SuiteConfig = RECORDINGS_ONLY,
    *,
    rate: int = 16000,
    utterances: int = 0,
) -> list[SuiteClip]:
    """The suite made of ``recordings`` (at ``rate`` Hz), in a fixed order.

    Only ``utterances`` of them, spread over the set, are in noise and truncated as well (0: all).
    Recordings without text are part of it as they are. Babble is made of speech, so without any it
    is left out.
    """
    speech = [r for r in recordings if r.text]
    if not speech:
        config = replace(config, nonspeech=tuple(k for k in config.nonspeech if k != "babble"))
    clips = [
        *_synthesized_nonspeech(speech, config, rate),
        *_speech_clips(speech, config, rate, utterances),
    ]
    return clips + [
        SuiteClip(r.key, RECORDED, r.wave, None, r.lang, r.speaker)
        for r in recordings
        if not r.text
    ]


def _synthesized_nonspeech(
    speech: Sequence[Recording], config: SuiteConfig, rate: int
) -> Iterator[SuiteClip]:
    waves = [r.wave for r in speech]
    langs = {r.lang for r in speech}
    size = round(config.seconds * rate)
    for k, kind in enumerate(config.nonspeech):
        lang = min(langs) if kind == "babble" and len(langs) == 1 else _UNDETERMINED
        for clip in range(config.clips):
            rng = np.random.default_rng([config.seed, 0, k, clip])
            wave = SOUNDS[kind](size, rate, rng, waves)
            yield SuiteClip(f"{kind}-{clip}", kind, wave, None, lang)


def _speech_clips(
    speech: Sequence[Recording], config: SuiteConfig, rate: int, utterances: int
) -> Iterator[SuiteClip]:
    waves = [r.wave for r in speech]
    count = min(utterances or len(speech), len(speech))
    changed = {i * len(speech) // count for i in range(count)}
    for i, r in enumerate(speech):
        yield SuiteClip(r.key, CLEAN, r.wave, r.text, r.lang, r.speaker)
        if i not in changed:
            continue
        # One noise per utterance, the same at each SNR, so that only the level changes.
        rng = np.random.default_rng([config.seed, 1, i])
        others = waves[:i] + waves[i + 1 :] or waves
        if config.snrs:
            noise = SOUNDS[config.noises[i % len(config.noises)]](len(r.wave), rate, rng, others)
            for snr in config.snrs:
                wave = mix(r.wave, noise, snr)
                yield SuiteClip(r.key, f"snr{snr:g}", wave, r.text, r.lang, r.speaker)
        for share in config.truncations:
            wave = r.wave[: max(1, round(share * len(r.wave)))]
            condition = f"cut{100 * share:.0f}"  # `truncated_share` parses it
            yield SuiteClip(r.key, condition, wave, r.text, r.lang, r.speaker)
        for name in config.channels:
            wave = through_channel(r.wave, name, rate, rng)
            yield SuiteClip(r.key, name, wave, r.text, r.lang, r.speaker)


def through_channel(wave: np.ndarray, name: str, rate: int, rng: np.random.Generator) -> np.ndarray:
    """``wave`` [n] through one of `CHANNELS` (`SuiteConfig.channels` says what they are)."""
    samples = torch.from_numpy(np.ascontiguousarray(wave, dtype=np.float32))
    if name == "quiet":
        return channel.amplify(samples, -18.0).numpy()
    if name == "padded":
        before, after = (silence(rate // 2, rate, rng) for _ in range(2))
        return np.concatenate((before, samples.numpy(), after))
    if name == "band":
        return channel.band_limit(samples, channel.TELEPHONE, rate).numpy()
    return channel.through_codec(samples, name, rate).numpy()


def truncated_share(condition: str) -> float | None:
    """The share of an utterance that remains in a condition such as ``cut50``, else None."""
    match = re.fullmatch(r"cut(\d+)", condition)
    return int(match[1]) / 100 if match else None


def mix(speech: np.ndarray, noise: np.ndarray, snr: float) -> np.ndarray:
    """Speech with noise at ``snr`` dB; the sum is scaled down if it would clip.

    Noise is repeated or cut to the speech's length. The speech is unchanged if either is silent.
    """
    noise = np.resize(noise, speech.shape)
    powers = [float(np.mean(np.square(side, dtype=np.float64))) for side in (speech, noise)]
    if min(powers) <= 0:
        return speech.astype(np.float32)
    gain = np.sqrt(powers[0] / powers[1] / 10 ** (snr / 10))
    mixed = speech + gain * noise
    return (mixed / max(1.0, float(np.abs(mixed).max()))).astype(np.float32)


def silence(
    size: int, rate: int, rng: np.random.Generator, speech: Sequence[np.ndarray] = ()
) -> np.ndarray:
    """What a quiet recorder gives: one bit of dither (±2⁻¹⁵), since exact zeros are rare."""
    return (rng.integers(-1, 2, size) / 32768).astype(np.float32)


def white(
    size: int, rate: int, rng: np.random.Generator, speech: Sequence[np.ndarray] = ()
) -> np.ndarray:
    """White Gaussian noise."""
    return _level(rng.standard_normal(size))


def babble(
    size: int, rate: int, rng: np.random.Generator, speech: Sequence[np.ndarray] = ()
) -> np.ndarray:
    """Six voices at once, each utterances on end at equal level, from random places: no word of
    which is meant to be transcribed. Raises UserError without speech."""
    if not any(len(wave) for wave in speech):
        raise UserError("noise suite: babble is made of speech; give utterances or leave it out")
    waves = [wave for wave in speech if len(wave)]
    total = np.zeros(size)
    for _ in range(6):
        parts, have = [], 0
        while have < size:
            wave = _level(waves[rng.integers(len(waves))])
            parts.append(np.roll(wave, -int(rng.integers(len(wave)))) if not parts else wave)
            have += len(wave)
        total += np.concatenate(parts)[:size]
    return _level(total)


def music(
    size: int, rate: int, rng: np.random.Generator, speech: Sequence[np.ndarray] = ()
) -> np.ndarray:
    """Music-like tones: chords and a melody in a major key, of decaying harmonic notes."""
    total = np.zeros(size)
    root = 110 * 2 ** (rng.integers(12) / 12)
    scale = np.array([0, 2, 4, 5, 7, 9, 11])
    beat = int(rate * rng.uniform(0.3, 0.6))
    for number, start in enumerate(range(0, size, beat)):
        degree = int(rng.integers(7))
        notes = [scale[rng.integers(7)] + 24]
        if number % 4 == 0:
            notes += [
                scale[(degree + step) % 7] + 12 * ((degree + step) // 7) for step in (0, 2, 4)
            ]
        for semitone in notes:
            seconds = np.arange(min(size - start, 3 * beat)) / rate
            pitch = root * 2 ** (semitone / 12)
            decay = np.exp(-4 * seconds) * np.minimum(1, seconds / 0.01)
            for harmonic in range(1, 6):
                if harmonic * pitch < rate / 2:
                    wave = np.sin(2 * np.pi * harmonic * pitch * seconds) * decay / harmonic
                    total[start : start + len(wave)] += wave
    return _level(total)


SOUNDS: dict[str, Callable[..., np.ndarray]] = {
    "silence": silence,
    "white": white,
    "babble": babble,
    "music": music,
}


def spoken_prefix(reference: str, hypothesis: str, lang: str, share: float) -> str:
    """The start of ``reference`` to judge a transcript of the first ``share`` of its audio against.

    It stands in for what was spoken before the cut, where no alignment gives it (**ours**): the
    longer of two prefixes in whole units by plain rules. One is the prefix nearest to the
    hypothesis, the shorter of equals: a true continuation from the language model passes, an
    invented one is left over. The other is ``share`` of the units, as if each took as long:
    misrecognized words are near to no prefix, yet are not invented if as many were spoken.
    """
    ref, hyp = units(reference, lang, "plain"), units(hypothesis, lang, "plain")
    best = min(range(len(ref) + 1), key=lambda size: Levenshtein.distance(ref[:size], hyp))
    return " ".join(ref[: max(best, round(share * len(ref)))])


def _level(wave: np.ndarray) -> np.ndarray:
    """At the common RMS, peaks kept within [−1, 1]; silence stays."""
    rms = float(np.sqrt(np.mean(np.square(wave, dtype=np.float64)))) if len(wave) else 0.0
    if rms <= 0:
        return wave.astype(np.float32)
    wave = wave * (_LEVEL / rms)
    return (wave / max(1.0, float(np.abs(wave).max()))).astype(np.float32)
