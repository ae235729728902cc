"""Sets that a corpus has stay apart; those that it lacks are made, the same in any order."""

from __future__ import annotations

import numpy as np
import pytest

from dsasr.setup.scan import UtteranceKeys
from dsasr.setup.splits import assign_sets, by_groups, shared, size_of_made
from dsasr.utils.errors import UserError
from dsasr.utils.hashing import hash64


def keys(speakers: list[str], sentences: list[str] | None = None) -> UtteranceKeys:
    count = len(speakers)
    sentences = sentences or [f"sentence {n}" for n in range(count)]
    speaker = [hash64(s) if s else 0 for s in speakers]
    arrays = speaker, list(map(hash64, sentences)), [0] * count, list(range(count))
    return UtteranceKeys(*(np.array(a, np.uint64) for a in arrays))


def made(found) -> dict[str, set[int]]:
    sets, _ = found
    return {one.role: set(one.chosen.tolist()) for one in sets}


@pytest.mark.parametrize(
    ("count", "size"), [(3, 1), (10, 1), (100, 10), (200, 20), (1000, 50), (10**6, 1000)]
)
def test_the_size_of_a_made_set(count, size):
    assert size_of_made(count) == size


def test_made_sets_share_no_speaker_with_training():
    speakers = [f"s{n % 20}" for n in range(400)]
    one = keys(speakers)
    sets, notes = assign_sets([""], np.zeros(400, np.int16), one)
    roles = made((sets, notes))
    assert set(roles) == {"train", "valid", "test"}
    assert sum(map(len, roles.values())) == 400 and not roles["train"] & roles["test"]
    heard = {role: {speakers[i] for i in members} for role, members in roles.items()}
    assert not heard["train"] & heard["valid"] and not heard["train"] & heard["test"]
    assert not heard["valid"] & heard["test"]
    assert all(len(roles[role]) >= size_of_made(400) for role in ("valid", "test"))
    assert "speakers that training does not have" in notes[0] and not list(shared(sets, one))


def test_the_same_sets_in_any_order():
    speakers = [f"s{n % 20}" for n in range(400)]
    order = np.random.default_rng(1).permutation(400)
    first = made(assign_sets([""], np.zeros(400, np.int16), keys(speakers)))
    sentences = [f"sentence {n}" for n in order]
    again = made(
        assign_sets([""], np.zeros(400, np.int16), keys([speakers[n] for n in order], sentences))
    )
    for role, members in again.items():
        assert {int(order[i]) for i in members} == first[role]


def test_one_speaker_alone_is_split_by_sentences():
    sentences = [f"sentence {n // 2}" for n in range(100)]  # each twice
    sets, notes = assign_sets([""], np.zeros(100, np.int16), keys(["x"] * 100, sentences))
    assert "sentences that training does not have" in notes[0]
    roles = made((sets, notes))
    texts = {role: {sentences[i] for i in members} for role, members in roles.items()}
    assert not texts["train"] & texts["valid"] and not texts["valid"] & texts["test"]
    told = list(shared(sets, keys(["x"] * 100, sentences)))
    assert any("shares 1 speaker" in line for line in told)


def test_one_sentence_by_one_speaker_is_split_all_the_same():
    sets, notes = assign_sets([""], np.zeros(9, np.int16), keys([""] * 9, ["yes"] * 9))
    assert {one.role: len(one.chosen) for one in sets} == {"train": 7, "valid": 1, "test": 1}
    assert "at random" in notes[0]


def test_splits_that_are_there_stay_apart_and_nothing_is_made_of_them():
    names = ["train-clean-100", "train-other-500", "dev-clean", "dev-other", "test-clean"]
    set_N = np.repeat(np.arange(5), 6).astype(np.int16)
    sets, notes = assign_sets(names, set_N, keys([f"s{n}" for n in range(30)]))
    assert [(one.name, one.role, len(one.chosen)) for one in sets] == [
        ("train-clean-100", "train", 6), ("train-other-500", "train", 6),
        ("dev-clean", "valid", 6), ("dev-other", "valid", 6), ("test-clean", "test", 6),
    ]  # fmt: skip
    assert not notes


def test_only_what_is_missing_is_made():
    set_N = np.array([0] * 40 + [1] * 4, np.int16)
    sets, notes = assign_sets(["train", "dev"], set_N, keys([f"s{n}" for n in range(44)]))
    assert [(one.name, one.role) for one in sets] == [
        ("train", "train"), ("dev", "valid"), ("test", "test")
    ]  # fmt: skip
    assert set(sets[1].chosen) == set(range(40, 44)) and "test (4" in notes[0]


def test_shared_speakers_and_sentences_are_told():
    set_N = np.array([0, 0, 1, 2], np.int16)
    both = keys(["a", "b", "b", "c"], ["x", "y", "z", "x"])
    sets, _ = assign_sets(["train", "valid", "test"], set_N, both)
    assert list(shared(sets, both)) == [
        "valid shares 1 speaker with the training data (100% of its utterances)",
        "test shares 1 sentence with the training data (100% of its utterances)",
    ]


def test_a_corpus_without_training_data_or_too_small():
    with pytest.raises(UserError, match="give the training data"):
        assign_sets(["dev", "test"], np.array([0, 1], np.int16), keys(["a", "b"]))
    with pytest.raises(UserError, match="2 utterances: at least 3"):
        assign_sets([""], np.zeros(2, np.int16), keys(["a", "b"]))


def test_a_speaker_of_most_utterances_stays_in_training():
    groups = np.array([7] * 90 + list(range(10, 20)), np.uint64)
    labels = by_groups(groups, 2, 5)
    assert (labels[:90] == 0).all() and sorted(np.bincount(labels)) == [5, 5, 90]


def test_too_few_groups_make_no_sets():
    assert by_groups(np.array([1, 1, 2, 2], np.uint64), 2, 1) is None
    assert by_groups(np.zeros(10, np.uint64), 1, 1) is None  # unknown ones are never held out
