from __future__ import annotations

import json
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parents[1] / "programs" / "drift_two.py"


@pytest.mark.launcher
def test_cka_over_two_ranks_is_that_of_one_process_in_float64(launch, tmp_path):
    done = launch(PROGRAM, tmp_path)
    assert done.returncode == 0, done.stdout[-3000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["same"] == pytest.approx(1, abs=1e-12)
    assert 0 < found["cka"] < 0.999
    # Features are fp32 in both; batched alike, only the order of float64 sums differs.
    assert found["cka"] == pytest.approx(found["expected"], abs=1e-9)
    assert found["unbiased"] == pytest.approx(found["expected_unbiased"], abs=1e-9)
    assert found["frames"] == found["expected_frames"] > 50
    assert len(found["layers"]) == 2 and all(0 < v < 0.9999 for v in found["layers"])
    assert found["layers"] == pytest.approx(found["expected_layers"], abs=1e-9)
    assert found["unbiased_layers"] == pytest.approx(found["expected_unbiased_layers"], abs=1e-9)
    assert found["unbiased_layers"] != pytest.approx(found["layers"], abs=1e-6)
    assert found["again"] == found["cka"]
    assert found["more"] == found["cka"]
    assert found["fewer"] == pytest.approx(found["expected_fewer"], abs=1e-9)
    assert "on other utterances" in found["other"] and "no utterance" in found["none"]
    assert found["broken"] == "nan"
