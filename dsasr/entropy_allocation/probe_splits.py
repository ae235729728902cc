"""Speaker-disjoint splits of a probe set: frames to train, validate and test probes on.

Parts consist of whole speakers, so that no speaker is in two of them; with fewer than 3 speakers
they consist of whole utterances, and ``by`` says so. The same utterances and the same seed give the
same parts for every checkpoint. All of it is **ours**.

`split` makes one test part. With few speakers it has only one or two of them, and the estimate
depends on which: `folds` tests each frame once, by probes that never saw its speaker.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SHARES = (0.65, 0.1, 0.25)  # of the frames: train, validation, test
ENOUGH_SPEAKERS = 12  # from this many on one split suffices
FOLDS = 4  # with fewer, or as many as there are speakers

Unit = tuple[int, ...]  # the utterances of a speaker, or one utterance


@dataclass(frozen=True)
class Split:
    """Row indices of a split. ``by`` is ``"speaker"`` where test speakers are new to the probes,
    ``"utterance"`` where there were too few speakers for that."""

    train_N: Tensor
    valid_N: Tensor
    test_N: Tensor
    by: str


def split(utterance_N: Tensor, speakers: Sequence[str], *, shares=SHARES, seed: int = 0) -> Split:
    """Split frames into train, validation and test, no speaker in two of them.

    ``utterance_N`` numbers the utterance of each frame, ``speakers[u]`` names its speaker. Speakers
    are drawn by ``seed`` into the part that lacks the most frames of its share. Raises ValueError
    with fewer than 3 utterances.
    """
    sizes = _sizes(utterance_N, speakers)
    units, by = _units(sizes, speakers)
    drawn = _drawn(units, torch.Generator().manual_seed(seed))
    return _rows(utterance_N, _deal(drawn, sizes, shares), by)


def folds(
    utterance_N: Tensor, speakers: Sequence[str], *, count: int = 0, seed: int = 0
) -> tuple[Split, ...]:
    """Splits whose test parts are disjoint and together all frames (with one fold: `split`).

    ``count`` groups of speakers, balanced by frames, are each the test part once; 0: one split
    where there are at least 12 speakers, else 4 folds, and never more folds than speakers. The
    validation part is drawn from the other groups: other speakers where at least 2 are left, else
    other utterances. Raises ValueError with fewer than 3 utterances, or if a test part leaves only
    one.
    """
    sizes = _sizes(utterance_N, speakers)
    units, by = _units(sizes, speakers)
    if not count:
        count = 1 if by == "speaker" and len(units) >= ENOUGH_SPEAKERS else FOLDS
    if count == 1:
        return (split(utterance_N, speakers, seed=seed),)
    count = min(count, len(units))
    generator = torch.Generator().manual_seed(seed)
    drawn = _drawn(units, generator)
    largest_first = sorted(drawn, key=lambda unit: -sum(sizes[u] for u in unit))
    out = []
    for test in _deal(largest_first, sizes, [1 / count] * count):
        rest = [unit for unit in drawn if unit not in test]
        if len(rest) < 2:
            rest = _drawn([(u,) for unit in rest for u in unit], generator)
        if len(rest) < 2:
            raise ValueError(f"{count} folds leave one utterance to train on: use more folds")
        train, valid = _deal(rest, sizes, [share / sum(SHARES[:2]) for share in SHARES[:2]])
        out.append(_rows(utterance_N, (train, valid, test), by))
    return tuple(out)


def _sizes(utterance_N: Tensor, speakers: Sequence[str]) -> list[int]:
    """Frames of each utterance."""
    return torch.bincount(utterance_N.cpu(), minlength=len(speakers)).tolist()


def _units(sizes: Sequence[int], speakers: Sequence[str]) -> tuple[list[Unit], str]:
    """The units to deal out, by name, and their kind: speakers, or utterances with too few."""
    present = [u for u, size in enumerate(sizes) if size]
    if len(present) < 3:
        raise ValueError(f"a split needs at least 3 utterances with frames, not {len(present)}")
    by = "speaker" if len({speakers[u] for u in present}) >= 3 else "utterance"
    groups: dict[object, list[int]] = {}
    for u in present:
        groups.setdefault(speakers[u] if by == "speaker" else u, []).append(u)
    return [tuple(groups[name]) for name in sorted(groups, key=str)], by


def _drawn(units: Sequence[Unit], generator: torch.Generator) -> list[Unit]:
    return [units[i] for i in torch.randperm(len(units), generator=generator).tolist()]


def _deal(units: Sequence[Unit], sizes: Sequence[int], shares: Sequence[float]) -> list[list[Unit]]:
    """Each unit in turn to the part that lacks the most of its share; no part stays empty."""
    total = sum(sizes[u] for unit in units for u in unit)
    filled, out = [0] * len(shares), [[] for _ in shares]
    for done, unit in enumerate(units):
        empty = [part for part, members in enumerate(out) if not members]
        parts = empty if len(units) - done <= len(empty) else range(len(shares))
        part = max(parts, key=lambda p: shares[p] - filled[p] / total)
        filled[part] += sum(sizes[u] for u in unit)
        out[part].append(unit)
    return out


def _rows(utterance_N: Tensor, parts: Sequence[Sequence[Unit]], by: str) -> Split:
    """The rows of train, validation and test utterances."""
    part_U = torch.full((int(utterance_N.max()) + 1,), -1, dtype=torch.int64)
    for part, units in enumerate(parts):
        for unit in units:
            part_U[list(unit)] = part
    part_N = part_U.to(utterance_N.device)[utterance_N]
    train_N, valid_N, test_N = ((part_N == p).nonzero()[:, 0] for p in range(3))
    return Split(train_N, valid_N, test_N, by)
