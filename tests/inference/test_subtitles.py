"""Subtitles fit a screen."""

from itertools import pairwise

from dsasr.inference.subtitles import LINE, LINES, LONGEST, cues, srt, vtt
from dsasr.inference.transcript import Segment
from dsasr.inference.words import Word, spread
from dsasr.utils.columns import width


def segment(text: str, start: float = 0.0, end: float = 30.0, gaps: bool = False) -> Segment:
    words = spread(text, start, end)
    if gaps:
        words = tuple(Word(w.text, w.start + 2 * i, w.end + 2 * i) for i, w in enumerate(words))
    return Segment(start, end, text, 1.0, False, True, (), words=words)


def test_lines_are_short_and_no_word_is_lost():
    text = " ".join(f"word{i:03d}" for i in range(120))
    found = list(cues([segment(text)]))
    assert " ".join(line for cue in found for line in cue.lines) == text
    assert all(width(line) <= LINE for cue in found for line in cue.lines)
    assert all(len(cue.lines) <= LINES and cue.end - cue.start <= LONGEST for cue in found)
    assert all(a.end <= b.start for a, b in pairwise(found))


def test_wide_characters_take_two_columns_and_no_spaces():
    found = list(cues([segment("我们周末去深圳动物园" * 9, end=5.0)]))
    assert "".join(line for cue in found for line in cue.lines) == "我们周末去深圳动物园" * 9
    assert max(width(line) for cue in found for line in cue.lines) == LINE
    (cue,) = cues([segment("给 maria 发短信", end=2.0)])
    assert cue.lines == ("给 maria 发短信",)


def test_a_pause_ends_a_subtitle():
    assert len(list(cues([segment("a b c", end=1.5, gaps=True)]))) == 3


def test_formats():
    parts = [segment("fish & <chips>", 0.5, 2.0), segment("more", 3725.0, 3726.5)]
    assert srt(parts) == (
        "1\n00:00:00,500 --> 00:00:02,000\nfish & <chips>\n\n"
        "2\n01:02:05,000 --> 01:02:06,500\nmore\n"
    )
    assert vtt(parts).startswith(
        "WEBVTT\n\n00:00:00.500 --> 00:00:02.000\nfish &amp; &lt;chips&gt;\n\n01:02:05.000"
    )
    assert (srt([]), vtt([])) == ("", "WEBVTT\n")


def test_an_accent_of_its_own_takes_no_column():
    word = "e\N{COMBINING ACUTE ACCENT}" * 7  # decomposed: two characters a column
    (cue,) = cues([segment(" ".join([word] * 10), end=5.0)])
    assert [width(line) for line in cue.lines] == [5 * 8 - 1] * 2


def test_a_word_wider_than_a_line_is_chopped():
    (cue,) = cues([segment("x" * 100, end=1.0)])
    assert "".join(cue.lines) == "x" * 100 and all(width(line) <= LINE for line in cue.lines)
