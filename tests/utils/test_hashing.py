"""Hashes of texts: the same everywhere, and those that repeat are found."""

from __future__ import annotations

from dsasr.utils.hashing import hash64, repeated


def test_a_hash_is_the_same_in_every_process():
    assert hash64("") == 0xE4A6A0577479B2B4
    assert hash64("\udcff") != hash64("\udcfe")  # of names that are no UTF-8


def test_repeated():
    assert repeated([]) == set() and repeated([5]) == set()
    assert repeated([3, 1, 2**63, 1, 2**63, 1]) == {1, 2**63}
