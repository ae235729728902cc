"""64-bit hashes of texts, the same in every process."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np


def hash64(text: str) -> int:
    """64 bits of ``text``'s BLAKE2b; lone surrogates, as of odd file names, are texts, too."""
    data = text.encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")


def repeated(hashes: Iterable[int]) -> set[int]:
    """The hashes that occur more than once; takes 16 bytes of memory for each."""
    array = np.sort(np.fromiter(hashes, np.uint64))
    return set(array[1:][array[1:] == array[:-1]].tolist())
