"""Pieces that overlap become one text."""

from dsasr.inference.joining import JOIN, join
from dsasr.inference.transcript import Segment, Transcription
from dsasr.inference.words import Word


def piece(start: float, text: str, overlap: float = 0.0, step: float = 0.5) -> Segment:
    """A segment whose words, one for each half second, follow one another from ``start`` on."""
    words = tuple(
        Word(word, start + i * step, start + (i + 1) * step, 0.9)
        for i, word in enumerate(text.split())
    )
    end = start + len(words) * step
    return Segment(start, end, text, 0.9, False, True, (), words=words, overlap=overlap)


def texts(*segments: Segment) -> str:
    return Transcription("a", tuple(join(segments))).text


def test_what_both_heard_is_kept_once():
    left = piece(0.0, "one two three four five")
    right = piece(1.5, "four five six seven", overlap=1.0)
    assert texts(left, right) == "one two three four five six seven"
    # The words that the cut went through are wrong on one side.
    left = piece(0.0, "one two three four fi")
    right = piece(1.0, "ree four five six", overlap=1.5)
    assert texts(left, right) == "one two three four five six"
    assert all(JOIN not in s.doubt for s in join([left, right]))


def test_the_same_word_at_another_time_is_another():
    left = piece(0.0, "no no no yes")
    right = piece(1.5, "yes no no", overlap=0.5)
    assert texts(left, right) == "no no no yes no no"


def test_without_a_common_word_each_side_keeps_its_half_and_the_join_is_doubted():
    left = piece(0.0, "a b c d")
    right = piece(1.0, "x y e f", overlap=1.0)
    first, second = join([left, right])
    assert (first.text, second.text) == ("a b c", "y e f")
    assert second.doubt == (JOIN,) and second.start == 1.5


def test_han_characters_and_pieces_that_do_not_overlap():
    words = tuple(Word(c, i / 2, (i + 1) / 2) for i, c in enumerate("我们周末去"))
    left = Segment(0.0, 2.5, "我们周末去", 1.0, False, True, (), words=words)
    more = tuple(Word(c, 1.5 + i / 2, 2 + i / 2) for i, c in enumerate("末去深圳"))
    right = Segment(1.5, 3.5, "末去深圳", 1.0, False, True, (), words=more, overlap=1.0)
    assert texts(left, right) == "我们周末去深圳"
    assert texts(piece(0, "a b"), piece(2, "b c")) == "a b b c"
    empty = Segment(1.5, 3.5, "", 0.0, True, True, (), overlap=1.0)
    assert texts(left, empty) == "我们周末去"
