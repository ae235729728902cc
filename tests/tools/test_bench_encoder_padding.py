from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

BENCH = Path(__file__).parent.parent.parent / "tools" / "bench"


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    for name in ("common", "encoder_padding"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import encoder_padding

    return encoder_padding


def test_padded_frames_are_transformers_and_own_frames_are_no_batchs(bench):
    encoder = bench.build("", "small", "cpu")
    assert max(bench.errors(encoder).values()) < 1e-5


def test_the_error_of_a_wrong_encoder_shows(bench):
    encoder = bench.build("", "small", "cpu")
    silence = encoder._silence
    encoder._silence = lambda *of: silence(*of) + 0.5
    assert bench.errors(encoder)["error_of_padded"] > bench.TOLERANCE


def test_batches_keep_to_the_budget_and_have_the_lengths_of_speech(bench):
    seconds = bench.seconds_of("")
    assert seconds.min() >= 2.05 and seconds.max() <= 15.34
    assert np.median(seconds) == pytest.approx(3.84, abs=0.3)
    lengths = bench.batches(seconds, 4000, 5)
    assert len(lengths) == 5
    assert all(len(one) * one.max() <= 4000 for one in lengths)
    # From the shortest to the longest.
    assert lengths[0].max() < 300 and lengths[-1].max() > 1000


def test_both_sides_encode_the_same_audio(bench):
    encoder = bench.build("", "small", "cpu")
    batch = bench.inputs([50, 31], encoder.bins, "cpu", torch.float32)
    assert batch.seconds == pytest.approx(0.81) and not batch.features_BTF[1, 31:].any()
    seen = []
    encoder.blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    for side in bench.SIDES:
        bench.run(encoder, side, "both", [batch])
    assert seen == [25, 1500]


@pytest.mark.slow
def test_a_line_a_pass_and_side(tmp_path):
    results = tmp_path / "results.jsonl"
    command = [sys.executable, BENCH / "encoder_padding.py", "--shape", "small"]
    command += ["--frames", "1600", "--batches", "2", "--rounds", "2"]
    env = os.environ | {"DSASR_BENCH_RESULTS": str(results)}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(x) for x in results.read_text().splitlines()]
    assert [(x["pass"], x["side"]) for x in lines] == [
        (kind, side) for kind in ("forward", "both") for side in ("own", "pad_to_30")
    ]
    for own, padded in zip(lines[::2], lines[1::2], strict=True):
        assert own["this_over_own"] == own["peak_over_own"] == 1
        # At 50 frames a second, and without padding but for the batch's.
        assert 50 <= own["frames_per_audio_s"] < 60
        assert padded["frames_per_audio_s"] == pytest.approx(
            1500 / padded["seconds_each"], rel=0.01
        )
        assert padded["this_over_own"] > 1.5
        assert padded["peak_mb"] > own["peak_mb"] > 0
