"""Join the transcripts of pieces that overlap: no word twice, and none that the cut went through.

Where speech goes on longer than a piece may be, the next piece begins before the last one ends. The
words of both in what they share are aligned: the longest run that both wrote at the same time is
kept once. Without such a run each side keeps its words up to the middle of what they share, and the
join is doubted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from dsasr.inference.transcript import Segment
from dsasr.inference.words import Word, cut_text, spread

SECONDS = 0.4  # by which the times of a word may differ on both sides
JOIN = "join"  # the doubt about a join without a common word


def join(segments: Sequence[Segment]) -> list[Segment]:
    """``segments`` of a file in order, each without the words that its neighbor keeps."""
    joined: list[Segment] = []
    for segment in segments:
        if segment.overlap and joined and segment.text and joined[-1].text:
            joined[-1], segment = _join(joined[-1], segment)
        joined.append(segment)
    return joined


def _join(left: Segment, right: Segment) -> tuple[Segment, Segment]:
    low, high = right.start, left.end  # what both hold
    words_l = left.words or spread(left.text, left.start, left.end)
    words_r = right.words or spread(right.text, right.start, right.end)
    from_l = next((i for i, w in enumerate(words_l) if w.end > low), len(words_l))
    upto_r = next((i for i, w in enumerate(words_r) if w.start >= high), len(words_r))
    run = _longest_run(words_l[from_l:], words_r[:upto_r])
    doubt = right.doubt
    if run is not None:
        at_l, at_r, count = run
        keep_l, skip_r = from_l + at_l + count, at_r + count
    else:
        middle = (low + high) / 2
        keep_l = sum((w.start + w.end) / 2 < middle for w in words_l)
        skip_r = sum((w.start + w.end) / 2 < middle for w in words_r)
        doubt = (*doubt, JOIN)
    return (
        _part(left, words_l, 0, keep_l, left.doubt),
        _part(right, words_r, skip_r, len(words_r), doubt),
    )


def _part(
    segment: Segment, words: Sequence[Word], first: int, stop: int, doubt: tuple[str, ...]
) -> Segment:
    if first == 0 and stop == len(words):
        return replace(segment, doubt=doubt)
    text = cut_text(segment.text, words, first, stop)
    kept = tuple(words[first:stop])
    start, end = (kept[0].start, kept[-1].end) if kept else (segment.start, segment.end)
    phonemes = tuple(p for p in segment.phonemes if start <= (p.start + p.end) / 2 <= end)
    return replace(
        segment,
        start=start,
        end=end,
        text=text,
        words=kept,
        phonemes=phonemes,
        doubt=doubt,
        alternatives=(),
        tokens=(),
    )


def _longest_run(left: Sequence[Word], right: Sequence[Word]) -> tuple[int, int, int] | None:
    """(position in ``left``, in ``right``, number of words) of the longest run of equal words at
    about the same time; of equally long ones the last. None without any."""
    best: tuple[int, int, int] | None = None
    lengths = [[0] * (len(right) + 1) for _ in range(len(left) + 1)]
    for i, word in enumerate(left):
        for j, other in enumerate(right):
            same = word.text.lower() == other.text.lower()
            if not same or abs(word.start + word.end - other.start - other.end) > 2 * SECONDS:
                continue
            count = lengths[i + 1][j + 1] = lengths[i][j] + 1
            if best is None or count >= best[2]:
                best = (i - count + 1, j - count + 1, count)
    return best
