from types import SimpleNamespace

import pytest

from dsasr.data.text.phonemizer import MissingPhonemes, StoredPhonemes


def test_stored():
    stored = StoredPhonemes()
    assert stored.for_sample(SimpleNamespace(phonemes=("a", "b"))) == ["a", "b"]
    with pytest.raises(MissingPhonemes):
        stored.for_sample(SimpleNamespace(phonemes=None))
