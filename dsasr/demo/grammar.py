"""Random sentences from a grammar: English, Mandarin and code-switched, split by content."""

from __future__ import annotations

import functools
import hashlib
import re
from collections import Counter
from collections.abc import Iterator

import numpy as np

from dsasr.data.text.scripts import HAN
from dsasr.demo import vocabulary

LANGS = ("en", "zh", "zh-en")
SPLITS = ("train", "valid", "test")
_SLOT = re.compile(r"\{(\w+)\}")
_UNIT = re.compile(f"[a-z]+|[{HAN}]")
_HELD_OUT = 20  # of 20 sentences, one belongs to valid and one to test


def split_of(text: str) -> str:
    """The split that a sentence belongs to, by its hash: the same in every corpus."""
    bucket = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "big")
    return {0: "test", 1: "valid"}.get(bucket % _HELD_OUT, "train")


@functools.lru_cache
def grammar(lang: str) -> tuple[tuple[str, ...], dict[str, tuple[str, ...]]]:
    """(sentence forms, slot → fillers) of ``lang``, one of `LANGS`."""
    if lang == "en":
        return vocabulary.ENGLISH_FORMS, {k: tuple(v) for k, v in vocabulary.ENGLISH_SLOTS.items()}
    slots = {k: tuple(v) for k, v in vocabulary.MANDARIN_SLOTS.items()}
    if lang == "zh":
        return vocabulary.MANDARIN_FORMS, slots
    english = {f"en_{k}": tuple(v) for k, v in vocabulary.ENGLISH_SLOTS.items()}
    return vocabulary.MIXED_FORMS, slots | english


def _uses(text: str, slots: dict[str, tuple[str, ...]]) -> Counter:
    """How often each slot is filled, on average, in a text with slots."""
    total: Counter = Counter()
    for name in _SLOT.findall(text):
        total[name] += 1
        for filler in slots[name]:
            for inner, uses in _uses(filler, slots).items():
                total[inner] += uses / len(slots[name])
    return total


@functools.lru_cache
def form_weights(lang: str) -> tuple[float, ...]:
    """Probabilities of the forms with which all fillers come up about equally often.

    A slot of n fillers should be filled n times as often as one of a single filler. Computed by
    multiplicative updates: forms whose slots come up too seldom gain weight.
    """
    forms, slots = grammar(lang)
    names = list(slots)
    uses = np.array([[_uses(form, slots)[name] for name in names] for form in forms], float)
    used = uses.sum(0) > 0
    uses, sizes = uses[:, used], np.array([len(slots[n]) for n in names], float)[used]
    weights = np.ones(len(forms)) / len(forms)
    for _ in range(300):
        rate = (weights @ uses) / sizes
        correction = rate.mean() / rate
        gain = (uses @ correction) / uses.sum(1)
        weights = weights * np.sqrt(gain)
        # No form may nearly vanish: the model should learn each kind of sentence.
        weights = np.maximum(weights / weights.sum(), 0.25 / len(forms))
    return tuple(weights / weights.sum())


class SentenceSampler:
    """An endless, seeded source of sentences of one language.

    Each slot, and the forms themselves, are drawn without replacement from shuffled decks: in any
    run of sentences all fillers come up about equally often.
    """

    def __init__(self, lang: str, seed: int) -> None:
        self.lang = lang
        self._forms, self._slots = grammar(lang)
        self._weights = form_weights(lang)
        self._rng = np.random.default_rng([seed, LANGS.index(lang)])
        self._decks: dict[str, list[str]] = {}
        self._form_deck: list[int] = []

    def _form(self) -> str:
        if not self._form_deck:
            shares = np.array(self._weights) * 8 * len(self._forms)
            counts = np.floor(shares + self._rng.random(len(shares))).astype(int)
            self._form_deck = np.repeat(np.arange(len(shares)), counts).tolist()
            self._rng.shuffle(self._form_deck)
        return self._forms[self._form_deck.pop()]

    def _draw_filler(self, slot: str, used: set[str]) -> str:
        deck = self._decks.setdefault(slot, [])
        if len(deck) < 2:
            fresh = list(self._slots[slot])
            self._rng.shuffle(fresh)
            deck[:0] = fresh  # drawn from the end: the last filler of the old deck comes first
        filler = deck.pop()
        if filler in used and deck:  # no "rice and rice", no "from paris to paris"
            filler, deck[-1] = deck[-1], filler
        used.add(filler)
        return self._fill(filler, used)

    def _fill(self, text: str, used: set[str]) -> str:
        return _SLOT.sub(lambda match: self._draw_filler(match.group(1), used), text)

    def draw(self) -> str:
        """The next sentence, of any split."""
        return " ".join(self._fill(self._form(), set()).split())

    def sentences(self, split: str) -> Iterator[str]:
        """Endless sentences of one split; a repeat only if 20 draws in a row gave no new one."""
        seen: set[str] = set()
        repeats = 0
        while True:
            text = self.draw()
            if split_of(text) != split:
                continue
            if text in seen and repeats < 20:
                repeats += 1
                continue
            repeats = 0
            seen.add(text)
            yield text


def units(text: str) -> list[str]:
    """Latin words and Han characters of ``text``."""
    return _UNIT.findall(text)


def select_diverse(pool: list[str], count: int) -> list[str]:
    """``count`` sentences of ``pool`` that use as many distinct units as evenly as possible.

    Greedy: the next sentence has the most of the least used units. For small held-out sets, where
    random sentences would miss many words.
    """
    used: Counter = Counter()
    remaining = [(text, units(text)) for text in pool]
    selected: list[str] = []
    for _ in range(min(count, len(remaining))):
        best = max(
            range(len(remaining)),
            key=lambda i: (
                sum(0.25 ** used[unit] for unit in remaining[i][1]) / len(remaining[i][1]) ** 0.5
            ),
        )
        text, parts = remaining.pop(best)
        selected.append(text)
        used.update(parts)
    return selected
