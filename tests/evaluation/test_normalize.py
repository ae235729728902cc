import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsasr.evaluation import normalize as n
from dsasr.utils.errors import UserError

MANDARIN = {
    "２０１２年，涨了3.5％。": "二零一二年涨了百分之三点五",
    "一共110个，1,234,567元": "一共一百一十个一百二十三万四千五百六十七元",
    "电话13800138000": "电话一三八零零一三八零零零",
    "-5度": "负五度",
    "100%，-100%": "百分之百负百分之百",
    "100%一定": "百分之百一定",
    "达到百分之一百点赞": "达到百分之百点赞",
    "1100%、110%和100.5%": "百分之一千一百百分之一百一十和百分之一百点五",
    "百分之一百零五": "百分之一百零五",
    "百分之一百万": "百分之一百万",
    "3:2获胜": "三比二获胜",
    "比分是10：3，": "比分是十比三",
    "25:21": "二十五比二十一",
    "按1:2.5:100": "按一比二点五比一百",
    "12:30到24:00": "十二点三十到二十四点",
    "12:30:45": "十二三十四十五",
    "2010-2012年": "二零一零二零一二年",
    "3:05 开会，4:00 走": "三点零五开会四点走",
    "1/2": "二分之一",
    "mp3和5G网络": "mp3和五g网络",
    "〇五年": "零五年",
    "过去10年": "过去十年",
    "98年": "九八年",
    "两百个": "二百个",
    "一十二个": "十二个",
    "我 爱 北京": "我爱北京",
    "（笑）好的！": "好的",
    "Hello，世界": "hello 世界",
    "": "",
}


@pytest.mark.parametrize(("text", "expected"), MANDARIN.items())
def test_mandarin(text, expected):
    assert n.mandarin(text) == expected
    assert n.mandarin(expected) == expected


@pytest.mark.parametrize(
    ("number", "spoken"),
    [
        (0, "零"),
        (10, "十"),
        (11, "十一"),
        (20, "二十"),
        (101, "一百零一"),
        (110, "一百一十"),
        (1010, "一千零一十"),
        (10005, "一万零五"),
        (100000, "十万"),
        (120034, "十二万零三十四"),
        (10**8, "一亿"),
        (10**8 + 1, "一亿零一"),
        (10**12, "一万亿"),
        (20010000, "二千零一万"),
        (10**15 + 10**4, "一千万亿零一万"),
    ],
)
def test_cardinal(number, spoken):
    assert n.cardinal(number) == spoken


def _parse(spoken: str) -> int:
    """Independent reader of Mandarin cardinals."""
    total = section = digit = 0
    for char in spoken:
        if char in "零一二三四五六七八九":
            digit = "零一二三四五六七八九".index(char)
        elif char in "十百千":
            power = {"十": 10, "百": 100, "千": 1000}[char]
            section += (digit or (1 if char == "十" else 0)) * power
            digit = 0
        elif char == "万":
            section, digit = (section + digit) * 10**4, 0
            total += section
            section = 0
        else:
            total, section, digit = (total + section + digit) * 10**8, 0, 0
    return total + section + digit


@given(st.integers(0, 10**16 - 1) | st.integers(0, 10**5))
def test_cardinal_is_invertible(number):
    assert _parse(n.cardinal(number)) == number


def test_cardinal_rejects_numbers_out_of_range():
    with pytest.raises(ValueError):
        n.cardinal(10**16)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Mr. Park visited room twenty-one.", "mister park visited room 21"),
        ("It's $20 million, um, really!", "it is $20000000 really"),
        ("I can't [noise] go", "i can not go"),
        ("they won’t", "they will not"),
        ("", ""),
    ],
)
def test_english_follows_whisper(text, expected):
    assert n.english(text) == expected


def test_english_spelling_table(tmp_path):
    table = tmp_path / "normalizer.json"
    table.write_text('{"colour": "color"}')
    assert n.english("Colour", str(table)) == "color"
    assert n.english("Colour") == "colour"
    # As rules: standard, with the table, in code-switched text as well.
    assert n.normalize("The COLOUR is 2", "en", str(table)) == "the color is 2"
    assert n.units("我要 colour 2", "zh-en", str(table)) == ["我", "要", "color", "2"]
    assert n.normalize("2个", "zh", str(table)) == n.normalize("2个", "zh")
    with pytest.raises(ValueError, match=r"normalizer\.json"):
        n.normalize("colour", "en", "whisper")
    table.write_text("[]")
    n._english_normalizer.cache_clear()
    n.english.cache_clear()
    with pytest.raises(UserError, match="JSON object"):
        n.english("Colour", str(table))
    with pytest.raises(UserError, match="cannot read"):
        n.english("Colour", str(tmp_path / "none.json"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("我有3个Apple和 three pears", ["我", "有", "三", "个", "apple", "和", "3", "pears"]),
        ("iPhone 15 很好", ["iphone", "15", "很", "好"]),
        ("今天we're在meeting 2点", ["今", "天", "we", "are", "在", "meeting", "二", "点"]),
        ("3个", ["三", "个"]),
        ("买了 3 books", ["买", "了", "3", "books"]),
        ("买了 three books", ["买", "了", "3", "books"]),
        ("比分 3:2 100% sure", ["比", "分", "三", "比", "二", "100%", "sure"]),
        ("……", []),
    ],
)
def test_mixed_units(text, expected):
    assert n.units(text, "zh-en") == expected


@pytest.mark.parametrize(
    ("lang", "unit"),
    [
        ("en", "word"),
        ("en-US", "word"),
        ("de", "word"),
        ("zh", "char"),
        ("zh-CN", "char"),
        ("ZH_hant", "char"),
        ("ja", "char"),
        ("zh-en", "mixed"),
        ("en_zh", "mixed"),
        ("cs", "mixed"),
    ],
)
def test_unit_of(lang, unit):
    assert n.unit_of(lang) == unit


def test_basic_keeps_other_scripts():
    assert n.basic("L’été, [bruit] c'est « beau » !") == "l'été c'est beau"
    assert n.units("Schöne Grüße!", "de") == ["schöne", "grüße"]
    assert n.units("東京です。", "ja") == list("東京です")


@settings(max_examples=100)
@given(st.text(max_size=40), st.sampled_from(["en", "zh", "zh-en", "de", "ja"]))
def test_any_text_is_scored(text, lang):
    out = n.normalize(text, lang)
    assert out == out.strip()
    assert "".join(n.units(text, lang)).replace(" ", "") == out.replace(" ", "")


def test_mandarin_is_stable_under_width_and_punctuation():
    rng = random.Random(0)
    for _ in range(50):
        body = "".join(rng.choices("我们今天去北京零一二三", k=8))
        noisy = "".join(c + rng.choice(["", "，", "。", " ", "！"]) for c in body)
        assert n.mandarin(noisy) == n.mandarin(body)
