"""An allocation row in files, in metrics lines, and back."""

import json
import math

import pytest

from dsasr.entropy_allocation.allocation_row import (
    AllocationRow,
    CtcEntropy,
    EncoderSource,
    Estimate,
    LlmAllocation,
)


def estimate(value: float, **values) -> Estimate:
    numbers = {"low": value - 0.1, "high": value + 0.1, "entropy_before": 2.0}
    numbers |= {"entropy_after": 2.0 - value, "shuffled": 0.004, "frames": 90, "utterances": 9}
    return Estimate(value, **numbers | {"split_by": "speaker", **values})


def row(**values) -> AllocationRow:
    figures = {
        "nse": 0.5, "effective_rank": 3.0, "pai": estimate(0.5),
        "csai": estimate(0.0, low=0.0, shuffled=math.nan, detection_limit=0.0123, folds_won=0),
        "cka_to_reference": 0.9, "reference": "run/step-1", "ctc": CtcEntropy(0.4, 0.7, 0.3),
        "llm": LlmAllocation(4.0, 1.0, 3.0, 2.0, 30), "width": 8, "frames": 90, "utterances": 9,
        "probe_seconds": 1.5, "settings": {"data": "shards", "seed": 0},
    }  # fmt: skip
    source = EncoderSource("run/step-2", "checkpoint", run="runs/run", steps=2, stage="joint")
    return AllocationRow(source, **figures | values)


def test_detection_needs_the_whole_interval_above_zero_and_above_the_control():
    assert estimate(0.5).detected and not estimate(0.05).detected
    assert not estimate(0.5, phoneme_only=0.45).detected
    assert estimate(0.5, phoneme_only=0.1).detected
    assert not estimate(0.5, shuffled=0.45).detected and estimate(0.5, shuffled=math.nan).detected
    assert estimate(-0.5).underfit and not estimate(0.0).underfit
    assert estimate(0.5).share == 0.25 and math.isnan(estimate(0.0, entropy_before=0.0).share)


def test_json_and_back():
    whole = row()
    plain = json.loads(json.dumps(whole.to_json(), allow_nan=False))
    assert AllocationRow.from_json(plain).to_json() == whole.to_json()
    assert (plain["pai"]["detected"], plain["csai"]["detected"]) == (True, False)
    assert plain["csai"]["detection_limit"] == 0.0123 and plain["pai"]["share"] == 0.25
    assert plain["llm"]["resolved"] == 3 and plain["settings"] == {"data": "shards", "seed": 0}
    # What was not measured is absent.
    assert "shuffled" not in plain["csai"] and "path" not in plain["encoder"]
    bare = AllocationRow(EncoderSource("x", "live"), nse=math.nan).to_json()
    assert bare == {"encoder": {"name": "x", "kind": "live"}}
    assert AllocationRow.from_json(bare).pai is None


def test_null_and_infinity_in_a_file_are_not_measured():
    plain = row().to_json()
    plain["nse"], plain["pai"]["low"], plain["llm"] = None, -math.inf, None
    again = AllocationRow.from_json(plain)
    assert math.isnan(again.nse) and math.isnan(again.pai.low) and again.llm is None


@pytest.mark.parametrize("old", [{"found": 1}, {"encoder": "encoder-40", "name": "x"}])
def test_fields_of_another_version_are_refused(old):
    with pytest.raises(ValueError, match=r"no field (found|name)"):
        AllocationRow.from_json(row().to_json() | old)


def test_scalars_and_back():
    scalars = row().scalars()
    assert scalars["pai"] == 0.5 and scalars["pai_low"] == 0.4 and scalars["pai_share"] == 0.25
    assert (scalars["pai_detected"], scalars["csai_detected"]) == (1.0, 0.0)
    assert scalars["llm_resolved"] == 3 and scalars["ctc_speech_entropy"] == 0.7
    assert "csai_shuffled" not in scalars and "pai_frames" not in scalars
    assert all(isinstance(value, float) for value in scalars.values())
    line = {"steps": 3, "stage": "allocation_joint", "ctc": 0.2, **scalars}
    again = AllocationRow.from_scalars(EncoderSource("joint", "live"), line)
    assert again.scalars() == scalars
    assert again.csai.detection_limit == 0.0123 and not again.csai.detected
    without = AllocationRow.from_scalars(EncoderSource("joint", "live"), {"nse": 0.5, "ctc": 0.2})
    assert without.pai is None and without.llm is None and without.ctc is None


def test_value_by_name():
    assert [row().value(name) for name in ("nse", "pai", "csai")] == [0.5, 0.5, 0.0]
    assert math.isnan(row(pai=None).value("pai"))
