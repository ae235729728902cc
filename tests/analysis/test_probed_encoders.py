"""Which encoders are opened, and what audio they read."""

from __future__ import annotations

import json

import pytest

from dsasr.analysis import probed_encoders


def test_the_longest_recording_is_one_that_all_encoders_can_read(tmp_path):
    folders = [tmp_path / name for name in ("whisper", "hubert")]
    for folder in folders:
        folder.mkdir()
    whisper = {"model_type": "whisper", "max_source_positions": 50}
    (folders[0] / "config.json").write_text(json.dumps(whisper))
    (folders[1] / "config.json").write_text('{"model_type": "hubert"}')
    assert probed_encoders.max_seconds(folders) == pytest.approx(1.0)
    assert probed_encoders.max_seconds(folders[1:]) == probed_encoders.MAX_SECONDS
