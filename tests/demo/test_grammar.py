import itertools
from collections import Counter

import pytest

from dsasr.data.text import espeak
from dsasr.data.text.espeak_phonemizer import EspeakPhonemizer
from dsasr.demo.grammar import (
    LANGS,
    SPLITS,
    SentenceSampler,
    grammar,
    select_diverse,
    split_of,
    units,
)

needs_espeak = pytest.mark.skipif(not espeak.available(), reason="espeakng-loader not installed")


def draw(lang, count, seed=0, split="train"):
    return list(itertools.islice(SentenceSampler(lang, seed).sentences(split), count))


@pytest.mark.parametrize(("lang", "least"), [("en", 300), ("zh", 300)])
def test_words_are_many_and_evenly_used(lang, least):
    counts = Counter(unit for text in draw(lang, 2000) for unit in units(text))
    assert len(counts) >= least
    assert min(counts.values()) >= 6
    # Equal draws of the words give some variation; a word ten times rarer than the median is a bug.
    assert min(counts.values()) * 6 >= sorted(counts.values())[len(counts) // 2]


@pytest.mark.parametrize(("lang", "shortest", "longest"), [("en", 3, 7), ("zh", 4, 10)])
def test_sentences_are_short(lang, shortest, longest):
    for text in draw(lang, 2000):
        assert shortest <= len(units(text)) <= longest, text


def test_text_convention():
    for text in draw("en", 500):
        assert text == " ".join(units(text)) and text.isascii() and text.islower()
    for text in draw("zh", 500):
        assert text == "".join(units(text))
    for text in draw("zh-en", 500):
        assert any(unit.isascii() for unit in units(text))
        assert any(not unit.isascii() for unit in units(text))


def test_splits_share_no_sentence():
    seen = {}
    for lang in LANGS:
        for split in SPLITS:
            for seed in (0, 1):
                for text in draw(lang, 150, seed, split):
                    assert split_of(text) == split
                    assert seen.setdefault(text, split) == split


def test_sampler_is_seeded():
    assert draw("zh", 50) == draw("zh", 50)
    assert draw("zh", 50) != draw("zh", 50, seed=1)


def test_train_sentences_hardly_repeat():
    texts = draw("en", 3000)
    assert len(set(texts)) > 0.97 * len(texts)


def test_spread_covers_more_than_plain_draws():
    pool = draw("en", 600, split="test")
    plain = {unit for text in pool[:150] for unit in units(text)}
    selected = select_diverse(pool, 150)
    assert len(set(selected)) == 150
    covered = {unit for text in selected for unit in units(text)}
    assert len(covered) >= 300 > len(plain)
    assert select_diverse(["a b", "a b", "c d"], 2) == ["a b", "c d"]
    assert select_diverse(["a"], 5) == ["a"]


@needs_espeak
@pytest.mark.parametrize("lang", ["en", "zh"])
def test_no_two_fillers_of_a_slot_sound_alike(lang):
    phonemizer = EspeakPhonemizer()
    for slot, fillers in grammar(lang)[1].items():
        plain = [filler for filler in fillers if "{" not in filler]
        assert len(set(fillers)) == len(fillers), slot
        sounds = [tuple(phonemizer.phonemes(filler, lang)) for filler in plain]
        assert all(sounds) and len(set(sounds)) == len(sounds), slot


@needs_espeak
def test_espeak_reads_every_character_itself():
    """No character of those that espeak-ng's Mandarin voice spells out in English."""
    text = "".join(sorted({c for t in draw("zh", 3000) for c in t}))
    for character in text:
        names = espeak.phoneme_names(character, "cmn", ipa=True)
        assert not any(name.startswith("(") for name in names), character
