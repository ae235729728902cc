from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from dsasr.data.audio.frontends import PretrainedFrontEnd
from dsasr.utils.errors import UserError

BENCH = Path(__file__).parent.parent.parent / "tools" / "bench"


@pytest.fixture
def frontends(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(BENCH))
    for name in ("common", "frontends"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "1")
    monkeypatch.setenv("DSASR_BENCH_RESULTS", str(tmp_path / "results.jsonl"))
    import frontends

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield frontends
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", ["whisper-80", "wav2vec2", "parakeet"])
def test_a_line_a_side_whose_figures_hang_together(frontends, tmp_path, name):
    frontends.measure(name, frontends.synthetic_clips(2), 2, "synthetic")
    lines = [json.loads(x) for x in (tmp_path / "results.jsonl").read_text().splitlines()]
    whisper = ["transformers_own"] if name == "whisper-80" else []
    sides = ["ours", "transformers", "transformers_batch", *whisper]
    assert [x["side"] for x in lines] == sides
    for one in lines:
        assert one["clock"] == "cpu time" and one["utterances"] == 2
        assert one["audio_s_per_core_s"] == pytest.approx(
            one["utterances_per_core_s"] * one["seconds_each"], rel=0.01
        )
        low, high = one["ours_over_this_range"]
        assert low <= one["ours_over_this"] <= high
    assert lines[0]["ours_over_this"] == 1


def test_features_that_differ_are_not_timed(frontends, monkeypatch):
    case = frontends.CASES["wav2vec2"]
    other = dataclasses.replace(case, front_end=PretrainedFrontEnd("wave", 1, normalize=False))
    monkeypatch.setitem(frontends.CASES, "wav2vec2", other)
    with pytest.raises(UserError, match="differ by"):
        frontends.measure("wav2vec2", frontends.synthetic_clips(1), 2, "synthetic")


def test_clips_of_2_to_10_seconds_are_taken_from_a_manifest(frontends, tmp_path):
    rows = []
    for seconds in (1, 3, 12):
        soundfile.write(tmp_path / f"{seconds}.wav", np.zeros(16000 * seconds), 16000)
        row = {"id": str(seconds), "text": "a", "audio": f"{seconds}.wav", "duration": seconds}
        rows.append(json.dumps(row))
    manifest = tmp_path / "all.jsonl"
    manifest.write_text("\n".join(rows))
    assert [len(clip) for clip in frontends.recorded_clips(str(manifest), 5)] == [48_000]
    manifest.write_text(rows[0])
    with pytest.raises(UserError, match="no utterance of 2 to 10 s"):
        frontends.recorded_clips(str(manifest), 5)
