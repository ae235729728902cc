import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsasr.entropy_allocation import forced_alignment as fa


def _log_probs(labels, classes=5, sure=4.0):
    logits = torch.zeros(len(labels), classes)
    logits[torch.arange(len(labels)), labels] = sure
    return logits.log_softmax(-1)


def test_follows_a_sure_path():
    path = [0, 0, 3, 0, 0, 0, 1, 1, 0, 1, 0, 0, 0, 0, 0]
    assert fa.best_path(_log_probs(path), [3, 1, 1]) == path
    positions_S = fa.align(_log_probs(path), [3, 1, 1], reach=2)
    # A gap of 3 frames: 2 to the left, 1 to the right.
    assert positions_S.tolist() == [0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, -1, -1, -1]


def _best_score(log_probs, phonemes):
    """Every path of S frames that collapses to the phonemes."""
    frames, classes = log_probs.shape
    best = -torch.inf
    for path in itertools.product(range(classes), repeat=frames):
        collapsed = [k for k, _ in itertools.groupby(path) if k]
        if collapsed == phonemes:
            best = max(best, sum(log_probs[s, p].item() for s, p in enumerate(path)))
    return best


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1000), phonemes=st.lists(st.integers(1, 2), min_size=1, max_size=3))
def test_is_the_best_path(seed, phonemes):
    log_probs = torch.randn(6, 3, generator=torch.Generator().manual_seed(seed)).log_softmax(-1)
    path = fa.best_path(log_probs, phonemes)
    score = sum(log_probs[s, p].item() for s, p in enumerate(path))
    assert score == pytest.approx(_best_score(log_probs, phonemes), abs=1e-4)
    positions = fa.align(log_probs, phonemes).tolist()
    assert [p for p, _ in itertools.groupby(positions) if p >= 0] == list(range(len(phonemes)))


def test_limits():
    log_probs = _log_probs([0, 1, 1, 2])
    assert fa.align(log_probs, []).tolist() == [-1] * 4
    assert fa.align(log_probs[:0], []).tolist() == []
    assert fa.align(log_probs, [1, 1, 2]).unique().tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="need 5"):
        fa.align(log_probs, [1, 1, 2, 3])
    for wrong in ([0], [5], [-1]):
        with pytest.raises(ValueError, match="blank"):
            fa.align(log_probs, wrong)


def test_posteriors_that_are_not_numbers_are_refused():
    log_probs = _log_probs([0, 1, 1, 2])
    log_probs[2, 3] = float("nan")
    for phonemes in ([1, 2], []):
        with pytest.raises(ValueError, match="NaN"):
            fa.align(log_probs, phonemes)


@pytest.mark.parametrize("frame_seconds", [0.01, 0.02, 0.04, 0.08])
def test_middles_on_an_edge_belong_to_the_span_that_begins_there(frame_seconds):
    # All spans meet at the middle of a frame: start is inside, end is not.
    edges = [round((s + 0.5) * frame_seconds, 6) for s in range(0, 300, 3)]
    spans = [["AB"[i % 2], *pair] for i, pair in enumerate(itertools.pairwise(edges))]
    positions = fa.read({"phonemes": spans}, 300, frame_seconds).positions_S.tolist()
    assert positions == [s // 3 if s < 297 else -1 for s in range(300)]


def test_spans_without_an_end_are_refused():
    for end in (float("inf"), float("nan")):
        with pytest.raises(ValueError, match="backwards"):
            fa.read({"phonemes": [["a", 0.0, end]]}, 10, 0.04)


@settings(max_examples=100)
@given(st.lists(st.sampled_from([0, 0, 0, 1]), max_size=30), st.integers(0, 5))
def test_fill(spikes, reach):
    counts = itertools.accumulate(spikes)
    positions = [p if s else -1 for s, p in zip(spikes, counts, strict=True)]
    out = fa.fill(positions, reach)
    known = [i for i, p in enumerate(positions) if p >= 0]
    for i, p in enumerate(out):
        near = min((abs(i - k) for k in known), default=99)
        assert (p >= 0) == (near <= reach)
        assert p < 0 or any(positions[k] == p and abs(i - k) <= near + 1 for k in known)


def test_read():
    stored = {
        "phonemes": [["h", 0.0, 0.1], ["i", 0.1, 0.22], ["SIL", 0.22, 0.3], ["j", 0.3, 0.4]],
        "words": [["hi", 0.0, 0.22], ["", 0.22, 0.3], ["j", 0.3, 0.4]],
    }
    read = fa.read(stored, 12, 0.04)
    #  middles 0.02 0.06 | 0.10 0.14 0.18 | 0.22 … 0.30 is the first of "j"
    assert read.positions_S.tolist() == [0, 0, 1, 1, 1, -1, -1, 2, 2, 2, -1, -1]
    # Silence is neither a phoneme nor a word.
    assert read.phonemes == ("h", "i", "j") and read.words == ("hi", "j")
    assert read.phoneme_words == [0, 0, 1]
    assert fa.read({}, 2, 0.04).phoneme_words is None
    for wrong in ([["h", 0.2, 0.1]], [["h", 0.0, 0.2], ["i", 0.1, 0.3]], [["h", 0.0]], ["h"]):
        with pytest.raises(ValueError, match="alignment"):
            fa.read({"phonemes": wrong}, 4, 0.04)


def test_words():
    assert fa.words_of("turn on 打开 light灯") == ["turn", "on", "打", "开", "light", "灯"]
    per_word = [list("tan"), list("on"), []]
    assert fa.words_of_phonemes(list("tanon"), per_word) == [0, 0, 0, 1, 1]
    assert fa.words_of_phonemes(list("tanron"), per_word) == [0, 0, 0, 0, 1, 1]
    assert fa.words_of_phonemes(list("taon"), per_word) == [0, 0, 1, 1]
    assert fa.words_of_phonemes(list("ta"), []) == [-1, -1]
    assert fa.word_frames(torch.tensor([-1, 0, 1, -1]), [4, 7]).tolist() == [-1, 4, 7, -1]


def test_token_words():
    pieces = ["tur", "n", " on", " ", "the", " lights", "!"]
    decode = lambda ids: "".join(pieces[i] for i in ids)  # noqa: E731
    words = fa.token_words("turn on the lights!", range(7), decode)
    assert words == [0, 0, 1, 2, 2, 3, 3]
    raw = "打开灯".encode()
    as_bytes = fa.token_words(
        "打开灯", list(raw), lambda ids: bytes(ids).decode("utf-8", "replace")
    )
    assert as_bytes == [0] * 3 + [1] * 3 + [2] * 3


def test_token_frames():
    words_S = torch.tensor([-1, 0, 0, 0, 0, -1, 1, 2, 2])
    out = fa.token_frames(words_S, [0, 0, 2], [3, 1, 5])
    assert out.tolist() == [-1, 0, 0, 0, 1, -1, -1, 2, 2]
