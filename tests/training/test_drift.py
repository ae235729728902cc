from __future__ import annotations

import json
from pathlib import Path

import pytest

from dsasr.training.drift import DriftTrigger

PROGRAM = Path(__file__).parents[1] / "programs" / "drift_two.py"


@pytest.mark.parametrize(
    ("cka", "fires"),
    [(1.0, False), (0.975, False), (0.9749, True), (0.5, True), (-0.1, True), (1.01, False)],
)
def test_trigger_fires_below_the_threshold(cka, fires):
    assert DriftTrigger(0.975).fires(cka) is fires


def test_trigger_refuses_nan():
    with pytest.raises(ValueError, match="not a number"):
        DriftTrigger(0.975).fires(float("nan"))


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
