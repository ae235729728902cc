"""Utterances in a file are those that were written."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dsasr.data.manifests.entry import ManifestEntry
from dsasr.data.manifests.entry_file import EntryWriter

ENTRIES = [
    ManifestEntry("a", Path("x/a b.wav"), "eins", "s", "de", 1.5, None, None, {"k": [1]}, "dev"),
    ManifestEntry("b", Path("x/line\nbreak.wav"), "zwei\u2028", start=0.5, end=2.0),
    ManifestEntry("c", Path(b"x/\xff.wav".decode("utf-8", "surrogateescape")), "三"),
]


def test_all_come_back_in_any_order(tmp_path):
    with EntryWriter(tmp_path / "entries") as writer:
        for entry in ENTRIES:
            writer.append(entry)
        found = writer.finish()
    assert list(found) == ENTRIES and len(found) == 3
    assert found[2] == ENTRIES[2] and found[-1] == ENTRIES[2]
    assert list(found.select(np.array([2, 0]))) == [ENTRIES[2], ENTRIES[0]]
    assert list(found.select(np.array([False, True, False]))) == [ENTRIES[1]]
    assert list(found[1:]) == ENTRIES[1:]
