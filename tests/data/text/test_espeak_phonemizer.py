# ruff: noqa: SIM905 - phonemes read better as text
import json
import pickle

import pytest

from dsasr.data.text import espeak
from dsasr.data.text.espeak_phonemizer import EspeakPhonemizer
from dsasr.utils.errors import UserError

needs_espeak = pytest.mark.skipif(not espeak.available(), reason="espeakng-loader not installed")


@needs_espeak
@pytest.mark.parametrize(
    ("text", "phonemes"),
    [
        ("turn on the lights", "t ɜː n ɔ n ð ə l aɪ t s"),
        ("请", "tɕʰ i3 ŋ"),
        ("妈麻马骂吗", "m ɑ1 m ɑ2 m ɑ3 m ɑ4 m ɑ5"),
        ("知吃是日", "tʂ ɨ1 tʂʰ ɨ1 ʂ ɨ4 ʐ ɨ4"),
        ("中国", "tʂ ʊ1 ŋ k uo2"),
        ("绿色", "l y4 s ɤ4"),
        ("播放 play", "p o1 f ɑ4 ŋ p l eɪ"),
        ("3点", "s a1 n t iɛ3 n"),
        # espeak-ng itself spells these out in English.
        ("穷", "tɕʰ iʊ2 ŋ"),
        ("你好，世界！", "n i3 x ɑu3 ʂ ɨ4 tɕ iɛ4"),
        ("", ""),
        ("…", ""),
    ],
)
def test_espeak_known_answers(text, phonemes):
    assert EspeakPhonemizer().phonemes(text, "zh") == phonemes.split()


SENTENCES = (
    "it is up to us",
    "we go to who and what",
    "may i help you, it said",
    "a man is as good as his word",
    "don't do it",
)


@needs_espeak
@pytest.mark.parametrize("text", SENTENCES)
def test_a_transcript_in_upper_case_sounds_as_in_lower_case(text):
    phonemizer = EspeakPhonemizer()
    for lang in ("en", "", "en-US"):
        assert phonemizer.phonemes(text.upper(), lang) == phonemizer.phonemes(text, lang)
    assert "".join(phonemizer.phonemes("IT IS", "en")) == "ɪɾɪz"


@needs_espeak
def test_abbreviations_in_mixed_case_are_spelled():
    phonemizer = EspeakPhonemizer()
    assert phonemizer.phonemes("US", "en") == "j uː ɛ s".split()
    for text in ("the US army", "打开 US 吧"):
        sounds = "".join(phonemizer.phonemes(text, "en"))
        assert "juːɛs" in sounds
    assert "juːɛs" not in "".join(phonemizer.phonemes("THE US ARMY", "en"))


@needs_espeak
def test_recorded_transcripts_sound_the_same_in_either_case(recordings):
    """speechocean762's are in upper case."""
    phonemizer = EspeakPhonemizer()
    lines = (recordings / "en_read" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert len(rows) == 600
    for row in rows:
        upper = phonemizer.phonemes(row["text"].upper(), row["lang"])
        assert upper == phonemizer.phonemes(row["text"].lower(), row["lang"]), row["text"]


@needs_espeak
@pytest.mark.parametrize(
    ("lang", "text", "phonemes"),
    [
        ("de", "ich", "ɪ ç"),
        ("de-AT", "ich", "ɪ ç"),
        ("DE_de", "ich", "ɪ ç"),
        ("de", "打开", "t ɑ3 kʰ ai1"),
        ("fr", "rue", "ʁ y"),
        ("en", "bath", "b æ θ"),
        ("en-GB", "bath", "b a θ"),
        ("en-XX", "bath", "b æ θ"),
        ("zh", "bath", "b æ θ"),
        ("", "bath", "b æ θ"),
        ("mixed", "bath", "b æ θ"),
        ("cs", "bath", "b æ θ"),  # switching, not Czech
        ("xx", "bath", "b æ θ"),
    ],
)
def test_a_text_is_read_in_its_language(lang, text, phonemes):
    assert EspeakPhonemizer().phonemes(text, lang) == phonemes.split()


@needs_espeak
def test_languages_that_espeak_does_not_know():
    phonemizer = EspeakPhonemizer()
    assert all(map(phonemizer.knows, ("en", "en-US", "zh", "zh-TW", "cs", "mixed", "de", "pt_BR")))
    assert not any(map(phonemizer.knows, ("xx", "english", "?", "")))
    assert phonemizer.knows("no") and phonemizer.voice("no") == "nb"  # Norwegian Bokmål


@needs_espeak
def test_espeak_never_leaks_its_markup():
    phonemizer = EspeakPhonemizer()
    for text in ("哪儿", "熊猫", "一点儿", "naïve café", "NASA 3.5 $5", "the_under|score"):
        for symbol in phonemizer.phonemes(text, "zh"):
            assert not set(symbol) & set("()_|ˈˌ. -"), (text, symbol)


@needs_espeak
def test_espeak_covers_every_common_character():
    """Level 1 of GB 2312: 3755 characters, each with exactly one tone."""
    phonemizer = EspeakPhonemizer()
    codes = [bytes([high, low]) for high in range(0xB0, 0xD8) for low in range(0xA1, 0xFF)]
    characters = [code.decode("gb2312", "ignore") for code in codes]
    characters = [character for character in characters if character]
    assert len(characters) == 3755
    symbols = set()
    for character in characters:
        phonemes = phonemizer.phonemes(character, "zh")
        symbols.update(phonemes)
        tones = [symbol for symbol in phonemes if symbol[-1].isdigit()]
        assert len(tones) == 1, (character, phonemes)
    assert len(symbols) < 180


@needs_espeak
def test_espeak_stress_is_an_option():
    assert EspeakPhonemizer(stress=True).phonemes("about", "en") == ["ɐ", "b", "ˈaʊ", "t"]
    assert EspeakPhonemizer().phonemes("about", "en") == ["ɐ", "b", "aʊ", "t"]


@needs_espeak
def test_espeak_phonemizer_travels_to_workers():
    copy = pickle.loads(pickle.dumps(EspeakPhonemizer(stress=True)))
    assert copy.phonemes("about", "en") == ["ɐ", "b", "ˈaʊ", "t"]


@needs_espeak
def test_phonemes_do_not_depend_on_what_was_spoken_before():
    phonemizer = EspeakPhonemizer(cache=1)
    before = phonemizer.phonemes("the red apple", "en")
    espeak.synthesize("你好", "cmn+f3")
    phonemizer.phonemes("猫", "zh")
    assert phonemizer.phonemes("the red apple", "en") == before


def test_missing_espeak_names_the_fix(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    monkeypatch.setattr(espeak, "_library", None)
    with pytest.raises(UserError, match=r"pip install.*dsasr\[demo\]"):
        EspeakPhonemizer().phonemes("hello", "en")


@needs_espeak
def test_unknown_voice():
    with pytest.raises(UserError, match="no voice"):
        espeak.phoneme_names("a", "xx-nowhere", ipa=True)


@needs_espeak
def test_phonemes_are_those_of_the_normalized_text():
    phonemizer = EspeakPhonemizer()
    full, half = ("Ａ股上涨１２", "请打开ＡＰＰ", "３点钟"), ("A股上涨12", "请打开APP", "3点钟")
    for raw, normal in zip(full, half, strict=True):
        assert phonemizer.phonemes(raw, "zh") == phonemizer.phonemes(normal, "zh")
    assert phonemizer.phonemes(full[0], "zh") != phonemizer.phonemes("A股上涨", "zh")
