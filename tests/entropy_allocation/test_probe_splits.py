"""Partitions of a probe set: whole speakers, every frame once, the same each time."""

import pytest
import torch

from dsasr.entropy_allocation import probe_splits


@pytest.mark.parametrize("count", [3, 4, 7, 40])
def test_split_is_speaker_disjoint(count):
    speakers = [f"s{u % count}" for u in range(5 * count)]
    utterance = torch.arange(5 * count).repeat_interleave(torch.arange(5 * count) % 13 + 2)
    split = probe_splits.split(utterance, speakers)
    assert split.by == "speaker"
    rows = torch.cat([split.train_N, split.valid_N, split.test_N])
    assert rows.sort().values.tolist() == list(range(len(utterance)))
    sides = [
        {speakers[u] for u in utterance[part].tolist()}
        for part in (split.train_N, split.valid_N, split.test_N)
    ]
    assert all(sides)
    assert not (sides[0] & sides[1] or sides[0] & sides[2] or sides[1] & sides[2])
    if count == 40:
        shares = [len(part) / len(utterance) for part in (split.train_N, split.valid_N)]
        assert shares == pytest.approx([0.65, 0.1], abs=0.05)
    again = probe_splits.split(utterance, speakers)
    assert torch.equal(again.test_N, split.test_N)


def test_split_with_few_speakers():
    utterance = torch.arange(6).repeat_interleave(4)
    split = probe_splits.split(utterance, ["a", "b"] * 3)
    assert split.by == "utterance"
    sides = [set(utterance[x].tolist()) for x in (split.train_N, split.valid_N, split.test_N)]
    assert sum(map(len, sides)) == 6 and all(sides)
    with pytest.raises(ValueError, match="3 utterances"):
        probe_splits.split(utterance[:8], ["a", "b"])


def _sides(split, utterance, name):
    return [{name(u) for u in utterance[rows].tolist()} for rows in _rows(split)]


def _rows(split):
    return split.train_N, split.valid_N, split.test_N


def _corpus(count, each=5):
    """Utterances of unequal lengths by ``count`` speakers, every second of whom says twice as many;
    numbers and names of speakers."""
    speakers = [f"s{v}" for v in range(count) for _ in range(each * (1 + v % 2))]
    lengths = torch.arange(len(speakers)) % 13 + 2
    return torch.arange(len(speakers)).repeat_interleave(lengths), speakers


@pytest.mark.parametrize(("count", "expected"), [(3, 3), (4, 4), (7, 4), (11, 4), (12, 1)])
def test_folds_hold_every_speaker_out_once(count, expected):
    utterance, speakers = _corpus(count)
    folds = probe_splits.folds(utterance, speakers)
    assert len(folds) == expected and {split.by for split in folds} == {"speaker"}
    for split in folds:
        train, valid, test = _sides(split, utterance, speakers.__getitem__)
        assert train and valid and test
        assert not (train & valid or train & test or valid & test)
        assert torch.cat(_rows(split)).sort().values.tolist() == list(range(len(utterance)))
    if expected == 1:
        assert torch.equal(folds[0].test_N, probe_splits.split(utterance, speakers).test_N)
        return
    held_out = torch.cat([split.test_N for split in folds])
    assert held_out.sort().values.tolist() == list(range(len(utterance)))
    again = probe_splits.folds(utterance, speakers)
    assert all(map(torch.equal, _rows(folds[0]), _rows(again[0])))
    other = probe_splits.folds(utterance, speakers, seed=1)
    assert not all(torch.equal(a.valid_N, b.valid_N) for a, b in zip(folds, other, strict=True))


def test_folds_are_balanced_by_frames():
    utterance, speakers = _corpus(40)
    folds = probe_splits.folds(utterance, speakers, count=4)
    assert [len(x.test_N) / len(utterance) for x in folds] == pytest.approx([0.25] * 4, abs=0.01)
    # Of the rest the validation part has the share that it has in one split.
    assert [len(x.valid_N) / len(utterance) for x in folds] == pytest.approx([0.1] * 4, abs=0.04)
    assert len(probe_splits.folds(utterance[:40], speakers, count=99)) == len(
        {*utterance[:40].tolist()}
    )


def test_folds_with_one_voice_left_validate_on_its_utterances():
    # One speaker has more frames than the two others: of two folds it is one.
    speakers = ["a"] * 20 + ["b"] * 4 + ["c"] * 4
    utterance = torch.arange(28).repeat_interleave(3)
    folds = probe_splits.folds(utterance, speakers, count=2)
    assert all(split.by == "speaker" for split in folds)
    tested = [_sides(split, utterance, speakers.__getitem__)[2] for split in folds]
    assert sorted(map(sorted, tested)) == [["a"], ["b", "c"]]
    alone = folds[tested.index({"b", "c"})]
    train, valid, test = _sides(alone, utterance, int)
    assert train and valid and not (train & valid or train & test or valid & test)
    with pytest.raises(ValueError, match="more folds"):
        probe_splits.folds(torch.arange(3), ["a", "b", "c"], count=2)


def test_folds_with_two_speakers_are_of_utterances():
    utterance = torch.arange(6).repeat_interleave(4)
    folds = probe_splits.folds(utterance, ["a", "b"] * 3)
    assert len(folds) == 4 and {split.by for split in folds} == {"utterance"}
    assert sorted(torch.cat([x.test_N for x in folds]).tolist()) == list(range(24))
    for split in folds:
        train, valid, test = _sides(split, utterance, int)
        assert train and valid and test
        assert not (train & valid or train & test or valid & test)
