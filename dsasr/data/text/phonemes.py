"""Phonemizers: espeak-ng, a lexicon, phonemes stored in shards.

English and Mandarin share one inventory of IPA symbols. A Mandarin vowel carries its tone as a
digit (1 high, 2 rising, 3 low, 4 falling, 5 neutral): ``請`` is ``tɕʰ i3 ŋ``.
"""

from __future__ import annotations

import functools
import itertools
import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from dsasr.data.text import espeak
from dsasr.data.text.characters import CharacterPhonemizer
from dsasr.data.text.normalization import clean_text, spoken_text
from dsasr.data.text.phoneme_vocab import PhonemeVocab, UnknownPhoneme
from dsasr.data.text.scripts import HAN, HAN_CHARACTER, HAN_LANGS, MIXED_LANGS, script_runs
from dsasr.data.text.token_units import TokenPhonemizer
from dsasr.data.text.tokenizers import Tokenizer
from dsasr.utils.errors import UserError
from dsasr.utils.package_data import RECIPES


class UnknownWord(ValueError):
    """The phonemizer has no pronunciation of ``word``."""

    def __init__(self, word: str) -> None:
        super().__init__(f"no pronunciation for {word!r}")
        self.word = word


class MissingPhonemes(ValueError):
    """A sample has no stored phonemes, but the phonemizer reads them from the shards."""


@runtime_checkable
class Phonemizer(Protocol):
    """Converts text to phonemes. The dataloader calls ``for_sample``."""

    def phonemes(self, text: str, lang: str) -> list[str]: ...

    def for_sample(self, sample) -> list[str]: ...


# ---- espeak-ng

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


# ---- lexicon

VARIANTS = 8  # pronunciations of a text, at most

_NUMBER = re.compile(r"\d+(\.\d+)?(e-?\d+)?", re.IGNORECASE)
_VARIANT = re.compile(r"\(\d+\)$")
_ARPABET = re.compile(r"^([A-Z]+)[0-2]$")
_MARKS = "".join(  # combining marks (Mn, Mc), as of Devanagari, Thai, Arabic and NFD: not in \\w
    chr(code) for code in range(0x300, 0x20000) if unicodedata.category(chr(code)) in ("Mn", "Mc")
)
# Zero-width joiners are part of words, too (Persian, Devanagari).
_WORD = re.compile(f"[{HAN}]+|(?:[^\\W_{HAN}]|['’\u200c\u200d{_MARKS}])+")


def lexicon_path(path: str | Path) -> Path:
    """The file of a lexicon: a bare name that is not in the working directory is looked up beside
    the packaged recipes."""
    path = Path(path)
    packaged = path.name == str(path) and not path.exists() and (RECIPES / path).exists()
    return RECIPES / path if packaged else path


def _probability_columns(rows: Sequence[tuple]) -> int:
    """How many numbers stand between word and phonemes in every row (number, word, …).

    A phoneme may be a digit, so a column counts only where one of its numbers has a decimal point.
    """
    columns = 0
    while rows and all(len(row) > columns + 3 for row in rows):
        column = [row[columns + 2] for row in rows]
        if not all(map(_NUMBER.fullmatch, column)) or not any("." in value for value in column):
            break
        columns += 1
    return columns


class LexiconPhonemizer:
    """Pronunciations from one or more files: ``word<tab or spaces>phones``, one word a line.

    CMUdict's own files read as they are: ``;;;`` comments, ``#`` remarks, and variants ``(2)``, of
    which the first wins. So do Kaldi's lexiconp.txt and MFA's dictionaries, whose columns of
    probabilities are left out. ARPAbet stress digits go unless ``stress``; pinyin tones stay. Words
    are looked up in lower case; a Han run takes the longest entry that fits, again and again.
    Files are found by `lexicon_path`. Raises `UserError` for a missing or malformed file,
    `UnknownWord` for a word that is not there.
    """

    def __init__(self, paths: str | Path | Sequence[str | Path], *, stress: bool = False) -> None:
        self.entries: dict[str, tuple[str, ...]] = {}
        self.others: dict[str, list[tuple[str, ...]]] = {}  # further pronunciations
        for path in [paths] if isinstance(paths, str | Path) else paths:
            self._read(Path(path), stress)
        if not self.entries:
            raise UserError("a lexicon phonemizer needs a lexicon file: set phonemizer.lexicons")
        self._longest = max((len(w) for w in self.entries if HAN_CHARACTER.match(w)), default=0)

    def _read(self, path: Path, stress: bool) -> None:
        path = lexicon_path(path)
        try:
            lines = path.read_text(encoding="utf-8-sig").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"lexicon {path} cannot be read: {error}") from None
        rows = []
        for number, line in enumerate(lines, 1):
            line = line.split(" #")[0].strip()
            if line and not line.startswith((";;;", "#")):
                rows.append((number, *line.split()))
        numbers = _probability_columns(rows)
        for number, word, *phones in rows:
            phones = phones[numbers:]
            if not phones:
                raise UserError(f"lexicon {path} line {number}: {word!r} has no phonemes")
            if not stress:
                phones = [_ARPABET.sub(r"\1", phone) for phone in phones]
            name = clean_text(_VARIANT.sub("", word)).lower()
            if self.entries.setdefault(name, tuple(phones)) != tuple(phones):
                self.others.setdefault(name, []).append(tuple(phones))

    def phonemes(self, text: str, lang: str = "") -> list[str]:
        return [symbol for word in self._words(text) for symbol in self.entries[word]]

    def variants(self, text: str, limit: int) -> list[list[str]]:
        """Up to ``limit`` pronunciations of ``text``: one of each word's, in every combination."""
        choices = [[self.entries[w], *self.others.get(w, ())] for w in self._words(text)]
        product = itertools.islice(itertools.product(*choices), limit)
        return [[symbol for word in words for symbol in word] for words in product]

    def _words(self, text: str) -> list[str]:
        """The entries that ``text`` is read by."""
        words: list[str] = []
        for match in _WORD.finditer(clean_text(text)):
            word = match.group().lower().replace("’", "'")
            bare = word.strip("'")
            if HAN_CHARACTER.match(word):
                words += self._han(word)
            elif word in self.entries or bare in self.entries:
                words.append(word if word in self.entries else bare)
            elif bare:
                raise UnknownWord(word)
        return words

    def _han(self, run: str) -> list[str]:
        words: list[str] = []
        start = 0
        while start < len(run):
            for length in range(min(self._longest, len(run) - start), 0, -1):
                if run[start : start + length] in self.entries:
                    words.append(run[start : start + length])
                    start += length
                    break
            else:
                raise UnknownWord(run[start])
        return words

    def for_sample(self, sample) -> list[str]:
        return self.phonemes(sample.text, sample.lang)


# ---- stored


class StoredPhonemes:
    """Phonemes stored in the shards, in each sample's ``phonemes``.

    Raises `MissingPhonemes` for a sample without them, and for text alone (`phonemes`).
    """

    def phonemes(self, text: str, lang: str = "") -> list[str]:
        raise MissingPhonemes("stored phonemes belong to samples: for new text choose espeak")

    def for_sample(self, sample) -> list[str]:
        if sample.phonemes is None:
            raise MissingPhonemes("the sample stores no phonemes")
        return list(sample.phonemes)


@dataclass(frozen=True)
class PhonemizerConfig:
    """``kind``: stored, espeak, lexicon, or characters or tokens (conventional CTC, no phonemes at
    all); ``lexicons``: files for kind lexicon."""

    # stored (in the shards), espeak (by each sample's language), lexicon, characters (labels are
    # letters: conventional CTC), or tokens (labels are the language model's)
    kind: str = "stored"
    # lexicon: pronunciation files; the first that has a word wins. digits.lexicon comes with dsasr.
    lexicons: tuple[str, ...] = ()
    stress: bool = False  # keep the stress marks of English vowels

    def __post_init__(self) -> None:
        if self.kind not in ("stored", "espeak", "lexicon", "characters", "tokens"):
            kinds = "stored, espeak, lexicon, characters or tokens"
            raise UserError(f"phonemizer kind {self.kind!r}: use {kinds}")
        if self.kind == "lexicon" and not self.lexicons:
            raise UserError("phonemizer kind lexicon needs lexicons=[FILE, …]")


def build_phonemizer(config: PhonemizerConfig, tokenizer: Tokenizer | None = None) -> Phonemizer:
    """The phonemizer that ``config`` names; kind tokens needs the language model's ``tokenizer``.

    Raises `UserError`.
    """
    if config.kind == "espeak":
        return EspeakPhonemizer(stress=config.stress)
    if config.kind == "lexicon":
        return LexiconPhonemizer(config.lexicons, stress=config.stress)
    if config.kind == "characters":
        return CharacterPhonemizer()
    if config.kind == "tokens":
        if tokenizer is None:
            raise UserError("phonemizer kind tokens: give the language model's tokenizer")
        return TokenPhonemizer(tokenizer)
    return StoredPhonemes()


@dataclass(frozen=True)
class Speller:
    """From a transcript to the ids of its units."""

    phonemizer: Phonemizer
    vocab: PhonemeVocab

    def __call__(self, text: str, lang: str) -> list[int] | None:
        """None where the phonemizer lacks a word, or the vocabulary a unit."""
        return self._encode(lambda: self.phonemizer.phonemes(text, lang))

    @property
    def writes_text(self) -> bool:
        """Whether the units are characters or tokens, of which a text's beginning has the first."""
        return isinstance(self.phonemizer, CharacterPhonemizer | TokenPhonemizer)

    def pronunciations(self, text: str, lang: str) -> list[list[int]]:
        """The units of each pronunciation of ``text``, the usual one first, at most `VARIANTS`.

        A lexicon's words may have several; of another phonemizer the words read one by one count
        as a second one, since what it says at their joins differs by speaker. Empty where the
        phonemizer cannot read ``text``.
        """
        usual = self(text, lang)
        if usual is None:
            return []
        if isinstance(self.phonemizer, LexiconPhonemizer):
            readings = self.phonemizer.variants(text, VARIANTS)
            others = [self._encode(lambda r=reading: r) for reading in readings]
        elif isinstance(self.phonemizer, EspeakPhonemizer):
            words = [self(word, lang) for word in text.split()]
            others = [None if None in words else list(itertools.chain(*words))]
        else:
            others = []
        found = {tuple(units): None for units in (usual, *others) if units is not None}
        return [list(units) for units in found]

    def _encode(self, read: Callable[[], Sequence[str]]) -> list[int] | None:
        try:
            return self.vocab.encode(read())
        except (UnknownPhoneme, UnknownWord, MissingPhonemes, UserError):
            return None
