"""Phonemes by espeak-ng.

English and Mandarin share one inventory of IPA symbols. A Mandarin vowel carries its tone as a
digit (1 high, 2 rising, 3 low, 4 falling, 5 neutral): ``請`` is ``tɕʰ i3 ŋ``.
"""

from __future__ import annotations

import functools
import re

from dsasr.data.text import espeak
from dsasr.data.text.normalization import spoken_text
from dsasr.data.text.phonemizer import UnknownWord
from dsasr.data.text.scripts import HAN_LANGS, MIXED_LANGS, script_runs

_TONES = {"55": "1", "35": "2", "214": "3", "21": "3", "51": "4", "11": "5", "22": "5"}
_STRESS = "ˈˌ"
_MANDARIN_VOICE = "cmn"
_LANGUAGE = re.compile(r"[a-z]{2,3}(-[a-z0-9]+)*")  # as BCP 47 writes it, in lower case
_OTHER_NAMES = {"en-gb": "en", "no": "nb"}  # tag → what espeak-ng calls it
# espeak-ng writes these Mandarin sounds in IPA with leftovers of its ASCII names.
_MANDARIN = {
    "ts.h": "tʂʰ",
    "ts.": "tʂ",
    "tsh": "tsʰ",
    "tɕh": "tɕʰ",
    "ph": "pʰ",
    "th": "tʰ",
    "kh": "kʰ",
    "s.": "ʂ",
    "i.": "ɨ",
    "i̪": "ɿ",
    "o-": "ɤ",
    "uo-": "uɤ",
    "χ": "x",
    "ŋ-": "ŋ",
}
# The syllables -iong, which espeak-ng 1.52 has no rule for: character → onset, tone.
_IONG = {
    character: (onset, tone)
    for characters, onset, tone in (
        ("兄凶胸匈汹芎", "ɕ", "1"),
        ("熊雄", "ɕ", "2"),
        ("穷琼邛茕穹蛩筇跫銎", "tɕʰ", "2"),
        ("炯窘迥", "tɕ", "3"),
        ("冂扃", "tɕ", "1"),
    )
    for character in characters
}


class EspeakPhonemizer:
    """espeak-ng's rules and dictionaries; Han runs are read by ``cmn``, all else by `voice`.

    It reads the text's `spoken_text`. ``stress`` keeps the marks ˈ and ˌ in front of vowels.
    Results are cached (``cache`` texts). Raises `UserError` where espeak-ng is missing, at the
    first text.
    """

    def __init__(self, *, english: str = "en-us", stress: bool = False, cache: int = 50_000):
        self.english, self.stress, self.cache = english, stress, cache
        self._cached = functools.lru_cache(maxsize=cache)(self._run)

    def __reduce__(self):  # without the cache
        return (
            functools.partial(
                EspeakPhonemizer, english=self.english, stress=self.stress, cache=self.cache
            ),
            (),
        )

    def phonemes(self, text: str, lang: str = "") -> list[str]:
        symbols: list[str] = []
        voice = self.voice(lang)
        for script, run in script_runs(spoken_text(text), lang):
            symbols += self._cached(run.strip(), _MANDARIN_VOICE if script == "zh" else voice)
        return symbols

    def voice(self, lang: str) -> str:
        """espeak-ng's voice for text of ``lang`` (de, pt-BR …) that is not Han.

        English, as ``english``, beside Han, and where ``lang`` names no language or one that
        espeak-ng does not know.
        """
        tag = lang.lower().replace("_", "-")
        primary = tag.partition("-")[0]
        if tag in ("", "en", *MIXED_LANGS) or primary in HAN_LANGS:
            return self.english
        tags = (tag,) if primary == "en" else (tag, primary)
        return next(filter(None, map(_named_voice, tags)), self.english)

    def knows(self, lang: str) -> bool:
        """Whether text of ``lang`` is read by rules of that language."""
        tag = lang.lower().replace("_", "-")
        primary = tag.partition("-")[0]
        known = tag in MIXED_LANGS or primary in ("en", *HAN_LANGS)
        return known or _named_voice(primary) is not None

    def for_sample(self, sample) -> list[str]:
        return self.phonemes(sample.text, sample.lang)

    def _run(self, text: str, voice: str) -> tuple[str, ...]:
        if not text:
            return ()
        mandarin = voice == _MANDARIN_VOICE
        return tuple(self._mandarin(text) if mandarin else self._alphabetic(text, voice))

    def _alphabetic(self, text: str, voice: str) -> list[str]:
        names = espeak.phoneme_names(text, voice, ipa=True)
        drop = "" if self.stress else _STRESS
        symbols = (name.translate(str.maketrans("", "", drop)) for name in names)
        return [symbol for symbol in symbols if symbol.strip() and symbol[0] != "("]

    def _mandarin(self, text: str) -> list[str]:
        """IPA for the sounds, the ASCII names for the tones: in IPA, 55 and 51 both print 5."""
        if len(text) == 1 and text in _IONG:
            onset, tone = _IONG[text]
            return [onset, f"iʊ{tone}", "ŋ"]
        ipa = [
            name for name in espeak.phoneme_names(text, _MANDARIN_VOICE, ipa=True) if name != " "
        ]
        plain = [
            name for name in espeak.phoneme_names(text, _MANDARIN_VOICE, ipa=False) if name != " "
        ]
        # Words that its Mandarin rules cannot read (熊, 哪儿) espeak-ng reads by the English ones,
        # marked as (en)…(cmn): read those character by character.
        broken = any(name.startswith("(") for name in ipa) or len(ipa) != len(plain)
        if broken and len(text) > 1:
            return [
                symbol for character in text for symbol in self._cached(character, _MANDARIN_VOICE)
            ]
        if broken:
            raise UnknownWord(text)
        return [
            symbol
            for sound, name in zip(ipa, plain, strict=True)
            for symbol in _mandarin_symbols(sound, name)
        ]


def _named_voice(tag: str) -> str | None:
    """espeak-ng's voice for a language's tag; the bindings would take a voice's name, too."""
    name = _OTHER_NAMES.get(tag, tag)
    return name if _LANGUAGE.fullmatch(tag) and espeak.has_voice(name) else None


def _mandarin_symbols(sound: str, name: str) -> list[str]:
    """The symbols of one sound with its tone digit, from espeak-ng's IPA and ASCII names."""
    contour = re.search(r"\d+$", name)
    sound = sound.strip(_STRESS)
    tone = _TONES.get(contour.group(), "") if contour else ""
    if tone and sound[-1] in "0123456789ɜ":  # IPA prints one digit of the contour, 3 as ɜ
        sound = sound[:-1]
    if sound.endswith("nɡ"):
        return [f"ʊ{tone}", "ŋ"]
    return [_MANDARIN.get(sound, sound) + tone]
