"""What transcripts are like: languages, script, case, punctuation, characters."""

from __future__ import annotations

import unicodedata
from collections import Counter

from dsasr.data.text.characters import WRITTEN_FORM
from dsasr.data.text.normalization import is_upper_case, normalize_text

_MARKS = frozenset(",.?!;:，。？！；：、")  # that a written sentence has
MOST = 0.9  # share of the transcripts from which on something holds of all (**ours**)
_LETTERS = 20_000  # distinct characters that are counted


def sentence_of(text: str) -> str:
    """A transcript without case and punctuation: two that are equal so are one sentence."""
    return normalize_text(text, WRITTEN_FORM)


class TextSurvey:
    """Counts over transcripts, which are added one by one."""

    def __init__(self) -> None:
        self.count = self.characters = 0
        self.upper = self.cased = self.marked = self.digits = 0
        self.langs: Counter[str] = Counter()
        self.letters: Counter[str] = Counter()

    def add(self, text: str, lang: str) -> None:
        self.count += 1
        self.characters += len(text)
        self.langs[lang] += 1
        self.cased += text.lower() != text.upper()
        self.upper += is_upper_case(text) or (len(text) > 1 and text.isupper())
        self.marked += bool(_MARKS.intersection(text))
        self.digits += any(map(str.isdigit, text)) if not text.isalpha() else False
        if len(self.letters) < _LETTERS:
            self.letters.update(text)

    @property
    def is_upper(self) -> bool:
        """Whether the transcripts are in capitals."""
        return self.cased > 0 and self.upper > MOST * self.cased

    @property
    def is_lower(self) -> bool:
        return self.cased > 0 and not any(c.isupper() for c in self.letters)

    @property
    def has_marks(self) -> bool:
        """Whether they are punctuated."""
        return self.marked > self.count / 2

    @property
    def main_lang(self) -> str:
        """The language that most utterances name; "": none does."""
        return max(self.langs, key=self.langs.__getitem__, default="")

    def scripts(self) -> list[tuple[str, float]]:
        """(script, share of the letters), the most common first: Latin, Han, Hiragana …"""
        counts: Counter[str] = Counter()
        for letter, n in self.letters.items():
            if letter.isalpha():
                counts[_script(letter)] += n
        total = counts.total() or 1
        return [(name, n / total) for name, n in counts.most_common()]

    @property
    def is_han(self) -> bool:
        """Whether most letters are Han characters, kana or Hangul, of which there are many."""
        share = dict(self.scripts())
        return share.get("Han", 0.0) + share.get("Hangul", 0.0) > 0.5

    def form(self) -> str:
        """Script, case and punctuation in words."""
        shown = [f"{name} {share:.0%}" for name, share in self.scripts()[:3] if share >= 0.005]
        scripts = " + ".join(shown) if len(shown) > 1 else shown[0].split()[0] if shown else "none"
        words = [f"script {scripts}"]
        if self.cased:
            case = (
                "in capitals" if self.is_upper else "lower case" if self.is_lower else "mixed case"
            )
            words.append(case)
        words.append("punctuated" if self.has_marks else "without punctuation")
        if self.digits:
            words.append(f"digits in {self.digits / self.count:.0%}")
        return ", ".join(words)


def _script(letter: str) -> str:
    """A letter's script by its Unicode name, in the words of UAX #24 where it is a common one."""
    name = unicodedata.name(letter, "").split(" ")[0]
    return {"CJK": "Han", "HIRAGANA": "Han", "KATAKANA": "Han"}.get(name, name.capitalize() or "?")
