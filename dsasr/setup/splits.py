"""Training, validation and test sets of a corpus: those that it has, and those that it lacks, made
by hash, so that they are the same on every machine and in whatever order utterances are read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from dsasr.setup.layouts import role_of
from dsasr.setup.scan import UtteranceKeys
from dsasr.utils.errors import UserError

# Of a set that is made (**ours**): its share of the utterances; at least so many of a corpus that
# has ten times as many, and at most so many.
SHARE, LEAST, MOST = 0.05, 20, 1000
KNOWN = 0.95  # share of the utterances whose speaker must be known for sets without common speakers
LARGEST = 0.25  # share of the utterances that one speaker, or sentence, of a made set may have
# What the sets of a corpus are to have none of in common, the best first.
GROUPINGS = {
    "speaker": "by speakers that training does not have",
    "recording": "of recordings that training does not have",
    "sentence": "of sentences that training does not have, by voices that it knows",
}


@dataclass(frozen=True)
class DataSet:
    """A set of the corpus: name, role (train, valid, test), and its utterances' indices [n]."""

    name: str
    role: str
    chosen: np.ndarray


def size_of_made(utterances: int) -> int:
    """Utterances of a validation or test set that is made of so many."""
    least = min(LEAST, max(1, utterances // 10))
    return min(MOST, max(least, round(SHARE * utterances)))


def assign_sets(
    sets: Sequence[str], set_N: np.ndarray, keys: UtteranceKeys
) -> tuple[list[DataSet], list[str]]:
    """(all sets, lines on how they came about) of utterances in ``sets`` (`dsasr.setup.scan`).

    Splits that the corpus has stay as they are and apart. Validation and test sets that it lacks
    are taken out of the training data. Raises `UserError` for a corpus without training data, and
    for one with too few utterances to give each set one.
    """
    roles = [role_of(name) or "train" for name in sets]
    if "train" not in roles:
        raise UserError(f"there is {' and '.join(sets)} data alone: give the training data, too")
    names = [name or ("train" if "train" not in sets else "more") for name in sets]
    made = [role for role in ("valid", "test") if role not in roles]
    pool = np.flatnonzero(np.isin(set_N, [i for i, role in enumerate(roles) if role == "train"]))
    label_N = np.zeros(len(set_N), np.int8)  # 0: in its own set, else 1 + the place in ``made``
    notes = []
    if made:
        if len(pool) < 1 + len(made):
            raise UserError(
                f"{len(pool)} utterances: at least {1 + len(made)} are needed, one for training "
                f"and one for each of {', '.join(made)}"
            )
        labels, grouping = _hold_out(keys, pool, len(made))
        label_N[pool] = labels
        notes = [_note(keys, pool, labels, made, grouping)]
    found = []
    for number, (name, role) in enumerate(zip(names, roles, strict=True)):
        chosen = np.flatnonzero((set_N == number) & (label_N == 0))
        if len(chosen):
            found.append(DataSet(name, role, chosen))
    for number, role in enumerate(made, 1):
        found.append(DataSet(role, role, np.flatnonzero(label_N == number)))
    return found, notes


def _hold_out(keys: UtteranceKeys, pool: np.ndarray, count: int) -> tuple[np.ndarray, str]:
    """(labels [n] of the pool: 0 training, 1 … ``count`` held out, the grouping used; "": none)."""
    wanted = size_of_made(len(pool))
    for grouping in GROUPINGS:
        groups = getattr(keys, grouping)[pool]
        if (groups != 0).mean() >= KNOWN:
            labels = by_groups(groups, count, wanted)
            if labels is not None:
                return labels, grouping
    # Utterance by utterance: sentences are mixed with the place, so that equal ones differ.
    order = np.argsort(keys.sentence[pool] ^ keys.copy[pool], kind="stable")
    labels = np.zeros(len(pool), np.int8)
    for number in range(1, count + 1):
        labels[order[(number - 1) * wanted : number * wanted]] = number
    return labels, ""


def by_groups(groups_n: np.ndarray, count: int, wanted: int) -> np.ndarray | None:
    """Labels [n] int8 of ``count`` held-out sets of at least ``wanted`` utterances each, in whole
    groups, in the order of their hashes; 0: training. Group 0 is never held out.

    None where the groups are too few or too large for that.
    """
    groups, inverse, sizes = np.unique(groups_n, return_inverse=True, return_counts=True)
    fits = (groups != 0) & (sizes <= max(LARGEST * len(groups_n), 1))
    label = np.zeros(len(groups), np.int8)
    candidates = iter(np.flatnonzero(fits).tolist())
    for number in range(1, count + 1):
        held = 0
        for place in candidates:
            label[place] = number
            held += int(sizes[place])
            if held >= wanted:
                break
        if not held:
            return None
    labels = label[inverse]
    return labels if (labels == 0).mean() >= 0.5 else None


def _note(
    keys: UtteranceKeys, pool: np.ndarray, labels: np.ndarray, made: Sequence[str], grouping: str
) -> str:
    parts = []
    for number, role in enumerate(made, 1):
        part = f"{role} ({np.count_nonzero(labels == number):,}"
        if grouping == "speaker":
            speakers = len(np.unique(keys.speaker[pool[labels == number]]))
            part += f", {speakers} speaker{'s' if speakers > 1 else ''}"
        parts.append(part + ")")
    how = GROUPINGS.get(grouping, "utterances at random: training knows their voices and sentences")
    return f"made of the training data: {' and '.join(parts)}, {how}"


def shared(data: Sequence[DataSet], keys: UtteranceKeys) -> Iterator[str]:
    """A line for each pair of sets with common speakers or sentences, where training is one."""
    for kind in ("speaker", "sentence"):
        values = getattr(keys, kind)
        in_training = np.unique(
            np.concatenate([values[s.chosen] for s in data if s.role == "train"])
        )
        for one in data:
            if one.role == "train":
                continue
            own = values[one.chosen]
            common = np.isin(own, in_training[in_training != 0])
            if common.any():
                count = len(np.unique(own[common]))
                yield (
                    f"{one.name} shares {count:,} {kind}{'s' if count > 1 else ''} with the "
                    f"training data ({common.mean():.0%} of its utterances)"
                )
