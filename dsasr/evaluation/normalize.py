"""Text normalization for scoring, by language: English, Mandarin, code-switched speech, others.

English follows Whisper's published normalizer (Radford et al. 2022, arXiv 2212.04356, appendix C),
by the class that ``transformers`` ships. Its table of British spellings is a file that comes with
each Whisper checkpoint (``normalizer.json``); it is applied if its path is given instead of a name
of rules (``evaluation.rules=…/normalizer.json``), as in published rates.

Mandarin (the rules are **ours**, the conventions those of the usual CER scripts): NFKC, so that
full-width forms become half-width; lower case; Arabic numbers become Chinese numerals as they are
read; punctuation is removed. Before 年 four digits are a year and read one by one, and so are two
that can hardly be a number of years (0x, 50 to 99). 3:20 is a time, and what cannot be one (3:2,
25:21) a ratio. 两 counts as 二, 幺 as 一, 〇 as 零 and 百分之一百 as 百分之百, since Arabic digits
do not say which was spoken. Traditional characters are not converted.

Code-switched text is split by script: Han runs are normalized by the Mandarin rules, Latin runs by
the English ones (`mixed`).
"""

from __future__ import annotations

import functools
import json
import re
import unicodedata
from collections.abc import Mapping
from pathlib import Path

from dsasr.data.text.scripts import (
    HAN,
    HAN_CHARACTER,
    HAN_LANGS,
    HAN_SPACES,
    MIXED_LANGS,
)
from dsasr.utils.errors import UserError

RULES = ("standard", "plain")
BY_SCRIPT = "?"  # ends the tag of utterances without a language, which their script stands for
CHAR_LANGS = frozenset(
    ["zh", "cmn", "yue", "wuu", "nan", "hak", "ja", "ko", "th", "lo", "my", "km"]
)

_SCRIPTS = {  # whose words have no spaces between them, but for Korean's
    "ko": "\uac00-\ud7af",
    "th": "\u0e00-\u0e7f",
    "lo": "\u0e80-\u0eff",
    "my": "\u1000-\u109f",
    "km": "\u1780-\u17ff",
}
_LATIN = r"a-z0-9\u00c0-\u024f"
_UNIT = re.compile(rf"[$€£¥]?[{_LATIN}]+(?:['.][{_LATIN}]+)*%?|\S")
_MIXED_TOKEN = re.compile(
    rf"[{HAN}]+|(?<![A-Za-z])-?\d[\d.,:/%]*(?![A-Za-z])|[^{HAN}\d]+|.", re.DOTALL
)
_DIGITS = "零一二三四五六七八九"
_HUNDRED_PERCENT = re.compile(rf"百分之一百(?![{_DIGITS}十百千万亿]|点[{_DIGITS}])")
# A digit that ends a Latin name (mp3, b2b) is no number: hence the first guard of each branch.
_NUMBER = re.compile(
    r"(?<![a-z\d.])(?:"
    r"(?P<percent>-?\d+(?:\.\d+)?)%"
    r"|(?P<year>\d{4}|0\d|[5-9]\d)(?=年|[-~至到]\d{4}年)"
    r"|(?P<over>\d{1,3})/(?P<under>\d{1,3})(?![/\d])"
    r"|(?P<hour>[01]?\d|2[0-4]):(?P<minute>[0-5]\d)(?![:\d])"
    # 1:10:30 is no ratio, neither as a whole nor its end.
    r"|(?P<ratio>(?<!\d:)(?!\d{1,2}(?::[0-5]\d){2}(?![:\d]))\d+(?:\.\d+)?(?::\d+(?:\.\d+)?)+)"
    r"|(?P<plain>-?\d+(?:\.\d+)?)"
    r")"
)


def unit_of(lang: str) -> str:
    """The unit in which errors of a language are counted: ``"word"``, ``"char"`` or ``"mixed"``.

    ``zh``, ``zh-CN``, ``zh_Hant``, ``ja``… count characters; ``zh-en``, ``en-zh``, ``cs`` and
    ``mixed`` count Han characters and Latin words; every other tag counts words.
    """
    tag = lang.lower().replace("_", "-").removesuffix(BY_SCRIPT)
    if tag in MIXED_LANGS:
        return "mixed"
    return "char" if tag.split("-")[0] in CHAR_LANGS else "word"


def scored_lang(lang: str, text: str) -> str:
    """``lang``; where that is empty, what the script of ``text`` stands for, with `BY_SCRIPT`: zh?,
    zh-en?, ja?, or "" for all scripts that are counted in words (**ours**)."""
    found = lang or _lang_of_script(text)
    return found if lang or not found else found + BY_SCRIPT


def _lang_of_script(text: str) -> str:
    if re.search(r"[\u3040-\u30ff]", text):
        return "ja"
    for tag, characters in _SCRIPTS.items():
        if re.search(f"[{characters}]", text):
            return tag
    if not HAN_CHARACTER.search(text):
        return ""
    return "zh-en" if re.search(r"[A-Za-z]{2}", text) else "zh"


def normalize(text: str, lang: str, rules: str = "standard") -> str:
    """``text`` in the form that is scored, with single spaces between words.

    ``rules="plain"`` applies `basic` whatever the language. Use it for digit strings: Whisper's
    rules join "eight oh nine" to the one word 809, and a word error rate becomes a string error
    rate. The path of a Whisper checkpoint's ``normalizer.json`` is ``"standard"`` with its table of
    British spellings. Raises ValueError for other rules.
    """
    check_rules(rules)
    spelling = rules if rules.endswith(".json") else None
    tag = lang.lower().replace("_", "-").removesuffix(BY_SCRIPT)
    base = tag.split("-")[0]
    if rules == "plain":
        return HAN_SPACES.sub("", basic(text))
    if tag in MIXED_LANGS:
        return mixed(text, spelling)
    if base in HAN_LANGS:
        return mandarin(text)
    return english(text, spelling) if base == "en" else basic(text)


def check_rules(rules: str) -> None:
    """Raise ValueError unless ``rules`` is one of `RULES` or names a JSON file."""
    if rules not in RULES and not rules.endswith(".json"):
        known = ", ".join(RULES)
        raise ValueError(
            f"rules must be one of {known} or the path of a normalizer.json, not {rules!r}"
        )


def units(text: str, lang: str, rules: str = "standard") -> list[str]:
    """Split ``text`` into units: words, or characters with Latin words left whole.

    A Latin word or a number inside character-scored text is one unit, as in the usual CER scripts.
    """
    text = normalize(text, lang, rules)
    return text.split() if unit_of(lang) == "word" else _UNIT.findall(text)


def basic(text: str) -> str:
    """Lower case, NFKC, no punctuation or symbols, single spaces: for languages without rules.

    Bracketed remarks (``[noise]``, ``<unk>``, ``(laughs)``) are removed, as in Whisper's basic
    normalizer; an apostrophe within a word stays.
    """
    text = unicodedata.normalize("NFKC", text).lower().replace("’", "'")
    text = re.sub(r"[<\[][^>\]]*[>\]]|\([^)]*\)", " ", text)
    text = re.sub(r"(?<!\w)'|'(?!\w)", " ", text)
    keep = (c if c == "'" or unicodedata.category(c)[0] not in "PSC" else " " for c in text)
    return " ".join("".join(keep).split())


@functools.lru_cache(maxsize=4)
def _english_normalizer(spelling: str | None):
    # Imported here because it takes seconds, and Mandarin does not need it.
    from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

    table: Mapping[str, str] = {}
    if spelling is not None:
        try:
            table = json.loads(Path(spelling).read_text(encoding="utf-8-sig"))
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read the spelling table {spelling}: {error}") from error
        if not isinstance(table, dict):
            raise UserError(f"{spelling} must be a JSON object of spellings, as normalizer.json is")
    return EnglishTextNormalizer(dict(table))


@functools.lru_cache(maxsize=8192)
def english(text: str, spelling: str | None = None) -> str:
    """Whisper's English form: lower case, contractions spelled out, numbers as digits, no fillers.

    ``spelling`` is the path of a Whisper checkpoint's ``normalizer.json`` (British → American).
    """
    text = unicodedata.normalize("NFKC", text).replace("’", "'")
    return _english_normalizer(spelling)(text).strip()


@functools.lru_cache(maxsize=8192)
def mandarin(text: str) -> str:
    """Mandarin in the form that is scored: no punctuation or spaces, numbers as they are read.

    Spaces between Latin words stay.

    A number of four digits before 年 is read digit by digit, and so is one with a leading zero or,
    unless it ends in 0000, of eight digits and more (a telephone number). Others are cardinals.

    >>> mandarin("２０１２年，涨了3.5％。")
    '二零一二年涨了百分之三点五'
    """
    text = unicodedata.normalize("NFKC", text).lower()
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)
    text = basic(_NUMBER.sub(_read_number, text))
    text = text.replace("两", "二").replace("幺", "一").replace("〇", "零")
    text = re.sub(rf"(?<![{_DIGITS}百千万亿点])一十", "十", text)
    return _HUNDRED_PERCENT.sub("百分之百", HAN_SPACES.sub("", text))


def _read_number(match: re.Match[str]) -> str:
    parts = match.groupdict()
    if parts["percent"]:
        spoken = _decimal(parts["percent"].lstrip("-"))
        # `_HUNDRED_PERCENT` alone would miss 100%一定, in which 一 may continue the number.
        spoken = "百" if spoken == "一百" else spoken
        return _negative("百分之" + spoken, parts["percent"])
    if parts["year"]:
        return _by_digit(parts["year"])
    if parts["over"]:
        return f"{_decimal(parts['under'])}分之{_decimal(parts['over'])}"
    if parts["hour"]:
        minute = parts["minute"]
        spoken = "" if minute == "00" else cardinal(int(minute))
        gap = "零" if spoken and minute[0] == "0" else ""
        return f"{cardinal(int(parts['hour']))}点{gap}{spoken}"
    if parts["ratio"]:
        return "比".join(map(_decimal, parts["ratio"].split(":")))
    # In 2010-2012 and A-3 the character is a dash, not a minus.
    before = match.string[match.start() - 1 : match.start()]
    sign = parts["plain"] if not before.isalnum() else ""
    return _negative(_decimal(parts["plain"].lstrip("-")), sign)


def _negative(spoken: str, number: str) -> str:
    return "负" + spoken if number.startswith("-") else spoken


def _by_digit(digits: str) -> str:
    return "".join(_DIGITS[int(d)] for d in digits)


def _decimal(number: str) -> str:
    whole, _, fraction = number.partition(".")
    code = (len(whole) > 1 and whole[0] == "0") or (len(whole) >= 8 and whole[-4:] != "0000")
    spoken = _by_digit(whole) if code or len(whole) > 16 else cardinal(int(whole))
    return f"{spoken}点{_by_digit(fraction)}" if fraction else spoken


def cardinal(number: int) -> str:
    """The Mandarin reading of 0 ≤ ``number`` < 10¹⁶: 110 → 一百一十, 10005 → 一万零五.

    Raises ValueError outside that range.
    """
    if not 0 <= number < 10**16:
        raise ValueError(f"{number} is outside 0…10^16")
    if number < 10:
        return _DIGITS[number]
    spoken, gap = "", False
    for power, name in ((12, "万"), (8, "亿"), (4, "万"), (0, "")):
        group = number // 10**power % 10**4
        if group:
            spoken += ("零" if spoken and (gap or group < 1000) else "") + _group(group) + name
        elif name == "亿" and spoken:
            spoken += name  # 10¹² is 一万亿
        gap = group == 0 and bool(spoken)
    return spoken[1:] if spoken.startswith("一十") else spoken


def _group(number: int) -> str:
    spoken, gap = "", False
    for power, name in ((3, "千"), (2, "百"), (1, "十"), (0, "")):
        digit = number // 10**power % 10
        if digit:
            spoken += ("零" if gap and spoken else "") + _DIGITS[digit] + name
        gap = digit == 0
    return spoken


def mixed(text: str, spelling: str | None = None) -> str:
    """Code-switched Mandarin and English, each run of a script by its language's rules.

    A number is Mandarin if it is adjacent to a Han character or to no Latin word. ``spelling``:
    see `english`.
    """
    tokens = _MIXED_TOKEN.findall(unicodedata.normalize("NFKC", text))
    runs: list[tuple[bool, str]] = []
    for at, token in enumerate(tokens):
        han = _is_han(token[0])
        if not han and not any(c.isalpha() for c in token):
            before, after = "".join(tokens[:at][-2:]), "".join(tokens[at + 1 :][:2])
            if any(c.isdigit() for c in token):
                touched = _is_han(before[-1:]) or _is_han(after[:1])
                near = (before.split() or [""])[-1], (after.split() or [""])[0]
                han = touched or not any(_has_latin(word) for word in near)
            else:
                han = runs[-1][0] if runs else True  # spaces and punctuation do not end a run
        if runs and runs[-1][0] == han:
            runs[-1] = (han, runs[-1][1] + token)
        else:
            runs.append((han, token))
    parts = [mandarin(run) if han else english(run, spelling) for han, run in runs]
    return " ".join(part for part in parts if part)


def _is_han(char: str) -> bool:
    return bool(char) and HAN_CHARACTER.match(char) is not None


def _has_latin(word: str) -> bool:
    return any(c.isalpha() and not _is_han(c) for c in word)
