"""Recordings with a text file of the same name beside each."""

from __future__ import annotations

import numpy as np
import pytest
import soundfile

from dsasr.data.manifests.registry import read_manifest, recognize
from dsasr.utils.errors import UserError


@pytest.fixture
def pair(tmp_path):
    def write(name: str, text: str | None, ending: str = ".txt"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, np.zeros(1600, np.int16), 16_000)
        if text is not None:
            path.with_suffix(ending).write_text(text, encoding="utf-8")

    return write


def test_each_text_is_its_recordings(tmp_path, pair):
    pair("a/one.wav", "\ufeff eins\n")
    pair("a/two.flac", "zwei", ".lab")
    pair("b/one.wav", "drei")
    pair("b/four.wav", None)
    assert recognize(tmp_path).name == "pairs"
    found = read_manifest(tmp_path, lang="de")
    assert [(e.id, e.text, e.lang) for e in found.utterances] == [
        ("one", "eins", "de"), ("two", "zwei", "de"), ("b-one", "drei", "de")
    ]  # fmt: skip
    assert [row[0] for row in found.left_out] == ["missing_text"]


def test_splits_stay_apart(tmp_path, pair):
    pair("train/a.wav", "x")
    pair("test/b.wav", "y")
    with pytest.raises(UserError, match="must stay apart"):
        read_manifest(tmp_path)
    assert [e.text for e in read_manifest(tmp_path, split="test").utterances] == ["y"]


def test_few_texts_beside_many_recordings_are_no_corpus(tmp_path, pair):
    pair("a.wav", "x")
    pair("b.wav", None)
    pair("c.wav", None)
    with pytest.raises(UserError, match="is no corpus"):
        recognize(tmp_path)
