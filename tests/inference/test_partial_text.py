"""What was shown changes in its last words at most."""

from __future__ import annotations

import random
import re

import pytest

from dsasr.inference.partial_text import PartialText


class Pieces:
    """Tokens are pieces of text."""

    end_id = -1
    pieces = (
        "play",
        "ing",
        " the",
        " dog",
        "我",
        "们",
        " ",
        "\N{REPLACEMENT CHARACTER}",
        "s",
        "123",
    )

    def decode(self, ids) -> str:
        return "".join(self.pieces[i] for i in ids)


def words(text: str) -> list[str]:
    return re.findall(r"[\u4e00-\u9fff]|[^\s\u4e00-\u9fff]+", text)


def test_tokens_of_two_hypotheses_in_a_row_are_settled():
    shown, tokenizer = PartialText(2), Pieces()
    assert shown.update([0, 1, 2, 3], tokenizer) == ("playing the", 0)
    assert shown.settled == ()
    assert shown.update([0, 1, 2, 4], tokenizer) == ("playing the我", 11)
    assert shown.settled == (0, 1, 2)
    assert shown.update([4, 5], tokenizer) == ("playing the我们", 12)
    assert shown.settled == (0, 1, 2, 4)


@pytest.mark.parametrize("seed", range(40))
def test_at_most_the_last_words_are_revised(seed):
    rng, tokenizer, limit = random.Random(seed), Pieces(), seed % 4
    shown, before, truth = PartialText(limit), "", [rng.randrange(10) for _ in range(30)]
    for step in range(1, 12):
        heard = truth[: 3 * step]
        follow = heard[len(shown.settled) :] if tuple(heard[: len(shown.settled)]) == (
            shown.settled) else []  # fmt: skip
        text, settled = shown.update([*follow, *(rng.randrange(10) for _ in range(3))], tokenizer)
        old, new = words(before), words(text)
        same = next((i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b),
                    min(len(old), len(new)))  # fmt: skip
        assert len(old) - same <= limit, (before, text)
        assert settled <= len(text)
        before = text
