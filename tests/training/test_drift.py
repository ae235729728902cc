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
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["same"] == pytest.approx(1, abs=1e-12)
    assert 0 < results["cka"] < 0.999
    # Features are fp32 in both; batched alike, only the order of float64 sums differs.
    assert results["cka"] == pytest.approx(results["expected"], abs=1e-9)
    assert results["unbiased"] == pytest.approx(results["expected_unbiased"], abs=1e-9)
    assert results["frames"] == results["expected_frames"] > 50
    assert len(results["layers"]) == 2 and all(0 < v < 0.9999 for v in results["layers"])
    assert results["layers"] == pytest.approx(results["expected_layers"], abs=1e-9)
    assert results["unbiased_layers"] == pytest.approx(
        results["expected_unbiased_layers"], abs=1e-9
    )
    assert results["unbiased_layers"] != pytest.approx(results["layers"], abs=1e-6)
    assert results["resumed"] == results["cka"]
    assert results["larger"] == results["cka"]
    assert results["smaller"] == pytest.approx(results["expected_smaller"], abs=1e-9)
    assert "on other utterances" in results["unknown"] and "no utterance" in results["empty"]
    assert results["nan"] == "nan"
