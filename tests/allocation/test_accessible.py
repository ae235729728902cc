import math

import pytest
import torch
from torch import nn
from torch.nn.functional import one_hot

from dsasr.allocation import accessible as a
from dsasr.errors import UserError

WORDS, PHONEMES = 9, 6
FAST = a.AccessibleConfig(window=0, control=False, draws=100)


def _corpus(window=0, utterances=60, speakers=12, seed=0):
    """Random words over six phonemes, each phoneme held for two frames. Features come later."""
    g = torch.Generator().manual_seed(seed)
    lexicon = [torch.randint(1, PHONEMES, (3,), generator=g).tolist() for _ in range(WORDS)]
    builder = a.FrameSetBuilder(window)
    for u in range(utterances):
        said = (torch.randint(0, WORDS, (8,), generator=g) ** 2 // WORDS).tolist()
        phonemes = [p for w in said for p in lexicon[w]]
        owners = torch.tensor([w for w in said for _ in range(3)])
        positions = torch.arange(len(phonemes)).repeat_interleave(2)
        frames = len(positions) + 1
        positions = torch.cat([positions, torch.tensor([-1])])
        words = torch.where(positions >= 0, owners[positions], -1)
        builder.add(torch.zeros(frames, 1), positions, phonemes, words, f"s{u % speakers}")
    return builder.build()


def _conditional_entropy(data, rows):
    """H(S | P) of the empirical counts, in nats."""
    table = torch.zeros(PHONEMES, WORDS).index_put_(
        (data.phoneme_N[rows], data.word_N[rows]), torch.ones(len(rows)), accumulate=True
    )
    joint = table / table.sum()
    return float(torch.special.entr(joint).sum() - torch.special.entr(joint.sum(1)).sum())


def _features(data, *names):
    columns = {
        "phoneme": one_hot(data.phoneme_N, PHONEMES),
        "word": one_hot(data.word_N, WORDS),
        "noise": torch.randn(len(data), 20, generator=torch.Generator().manual_seed(9)),
    }
    return data.with_features(torch.cat([columns[name].float() for name in names], 1))


def test_one_hot_phonemes():
    data = _features(_corpus(), "phoneme")
    result = a.pai(data, FAST)
    _, parts = a._prepare(data, FAST, 10**6)
    shares = torch.bincount(data.phoneme_N[parts.test_N]) / len(parts.test_N)
    assert result.value == pytest.approx(torch.special.entr(shares).sum().item(), rel=0.02)
    assert result.share == pytest.approx(1, abs=0.005)
    assert result.left < 0.01
    assert result.low <= result.value <= result.high
    assert result.split == "speaker" and result.sound
    extra = a.csai(data, FAST)
    assert extra.value == pytest.approx(0, abs=0.005)


def test_words_beside_phonemes():
    data = _features(_corpus(), "phoneme", "word")
    result = a.csai(data, FAST)
    _, parts = a._prepare(data, FAST, 10**6)
    expected = _conditional_entropy(data, parts.test_N)
    assert expected > 0.5
    assert result.value == pytest.approx(expected, rel=0.05)
    assert result.given == pytest.approx(expected, rel=0.05)
    assert result.left < 0.01


def test_the_window_takes_what_context_gives():
    data = _features(_corpus(window=2), "phoneme", "word")
    narrow, wide = (a.csai(data, a.AccessibleConfig(window=w, control=False)) for w in (0, 2))
    assert wide.given < narrow.given - 0.3
    assert wide.value < narrow.value - 0.3
    with pytest.raises(ValueError, match="window of 2"):
        a.csai(data, a.AccessibleConfig(window=3))


def test_white_noise():
    data = _features(_corpus(utterances=400, speakers=40), "noise")
    for estimate in (a.pai, a.csai):
        result = estimate(data, FAST)
        assert result.value == pytest.approx(0, abs=0.01)
        assert result.low - 0.01 <= 0 <= result.high + 0.01


def test_useless_features_do_not_hide_the_context():
    # Few frames, many dimensions, and a window that already tells the word.
    data = _corpus(window=2, utterances=40)
    g = torch.Generator().manual_seed(4)
    data = data.with_features(torch.randn(len(data), 200, generator=g))
    result = a.csai(data, a.AccessibleConfig(control=False))
    assert result.given < 0.3
    assert result.value == pytest.approx(0, abs=0.03)


def test_shuffled_control_is_nothing():
    data = _features(_corpus(utterances=400, speakers=40), "phoneme", "word")
    config = a.AccessibleConfig(window=0)
    assert a.pai(data, config).shuffled == pytest.approx(0, abs=0.01)
    assert a.csai(data, config).shuffled == pytest.approx(0, abs=0.01)
    assert math.isnan(a.pai(data, FAST).shuffled)


def test_partial_information():
    # The phoneme is seen in 60% of frames, else nothing: PAI = 0.6 of H(P) and a little more,
    # since unseen frames are told apart from seen ones.
    data = _corpus(utterances=120)
    seen = torch.rand(len(data), generator=torch.Generator().manual_seed(1)) < 0.6
    x = one_hot(data.phoneme_N, PHONEMES).float() * seen[:, None]
    assert a.pai(data.with_features(x), FAST).share == pytest.approx(0.6, abs=0.03)


def test_wide_features_are_projected():
    data = _features(_corpus(), "phoneme", "noise")
    narrow = a.AccessibleConfig(window=0, control=False, max_width=12)
    assert a._prepare(data, narrow, 10**6)[0].x_NE.shape[1] == 12
    assert a.pai(data, narrow).value < a.pai(data, FAST).value
    few = a.AccessibleConfig(max_frames=800, semantic_frames=500, control=False)
    assert a.pai(data, few).frames > a.csai(_features(_corpus(2), "phoneme"), few).frames
    first, _ = a._prepare(data, few, 500)
    assert len(first) == 500
    assert torch.equal(first.phoneme_N, a._prepare(data, few, 500)[0].phoneme_N)


def test_rare_labels_are_one():
    label = torch.tensor([5, 5, 5, 2, 2, 9, 7])
    ids, classes = a.frequent(label, label[:6], 2)
    assert ids.tolist() == [0, 0, 0, 1, 1, 2, 2] and classes == 3


def test_window():
    places = torch.tensor([0, 2, 3])
    assert a.phoneme_window(places, [4, 5, 6, 7], 1).tolist() == [[0, 4, 5], [5, 6, 7], [6, 7, 0]]


def test_builder_leaves_silence_out():
    builder = a.FrameSetBuilder(1)
    positions = torch.tensor([-1, 0, 0, 1])
    builder.add(torch.arange(4.0)[:, None], positions, [3, 2], torch.tensor([-1, 8, -1, 8]), "x")
    data = builder.build()
    assert data.x_NE[:, 0].tolist() == [1, 3]
    assert data.window_NK.tolist() == [[0, 3, 2], [3, 2, 0]]
    assert data.word_N.tolist() == [8, 8]
    with pytest.raises(ValueError, match="4 frames"):
        builder.add(torch.zeros(4, 1), positions[:3], [3, 2], positions, "x")
    with pytest.raises(ValueError, match="no utterance"):
        a.FrameSetBuilder().build()
    with pytest.raises(ValueError, match="labelled"):
        data.with_features(torch.zeros(3, 2))
    with pytest.raises(UserError):
        a.AccessibleConfig(level=1.0)


def test_reinitialised():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.matrix = nn.Parameter(3 * torch.randn(50, 50))
            self.scale = nn.Parameter(torch.full((4,), 2.0))
            self.linear = nn.Linear(8, 8)

    odd = Odd()
    before = torch.get_rng_state()
    random = a.reinitialised(odd, seed=1)
    assert torch.equal(before, torch.get_rng_state())
    assert not torch.equal(random.linear.weight, odd.linear.weight)
    assert not torch.equal(random.matrix, odd.matrix)
    assert random.matrix.std().item() == pytest.approx(3, rel=0.1)
    assert torch.equal(random.scale, odd.scale)
    assert torch.equal(random.matrix, a.reinitialised(odd, seed=1).matrix)
    assert not any(q.requires_grad for q in random.parameters()) and odd.scale.requires_grad
