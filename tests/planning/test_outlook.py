"""The outlook of a run on this machine: memory, hours, disk, and what falls short."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dsasr import recipe
from dsasr.planning import outlook
from dsasr.planning.memory import Machine


@pytest.fixture
def of_tiny(tiny, monkeypatch):
    """``of_tiny(*overrides)``: the outlook of the tiny recipe on a CPU of 1 TFLOP/s and 8 GB."""
    machine = Machine(1, 1, 8.0, 0.5, cpu=True, reserve=0.0)
    monkeypatch.setattr(outlook, "this_machine", lambda: (machine, "1 CPU rank"))
    hours = {"pretrain": 0.02, "align": 0.02, "joint": 0.04}

    def build(*overrides: str) -> outlook.Outlook:
        return outlook.outlook(recipe.load(str(tiny), list(overrides)), (0.6, 0.0), hours)

    return build


def test_stages_parts_and_disk(of_tiny):
    found = of_tiny()
    assert [cost.stage for cost in found.costs] == ["pretrain", "align", "ia_sft", "joint"]
    assert set(found.parts) == {"encoder", "ctc", "adaptor", "llm"} and not found.elsewhere
    assert found.hours > 0 and found.disk < found.free
    text = outlook.lines(found)
    names = [line.split()[0] for line in text[:5]]
    assert names == ["PLAN", "pretrain", "align", "ia_sft", "joint"]
    # 20 steps of 4 s each, from 0.02 hours of data; of ia_sft no hours are known.
    assert text[1].split()[3:5] == ["20", "1.11"] and " - " in text[3]
    assert "at half of the 1 TFLOP/s" in text[5]
    assert not outlook.warnings(found) and not outlook.faults(found)


def test_one_branch_alone(of_tiny):
    found = of_tiny("branch=pretrain")
    assert [cost.stage for cost in found.costs] == ["pretrain"]


def test_what_falls_short(of_tiny):
    found = of_tiny()
    (line,) = outlook.faults(replace(found, free=found.disk - 1))
    assert "are free: free some" in line and line.endswith("TROUBLESHOOTING.md#disk")
    little = replace(found, machine=replace(found.machine, memory=1e-6))
    (line,) = outlook.warnings(little)
    assert "smaller data.dataloader.batch.frames" in line and line.endswith("#out-of-memory")


def test_a_run_too_long_for_a_cpu_is_compared_with_gpus(of_tiny, monkeypatch):
    monkeypatch.setattr(outlook, "LONG", 0.0)
    found = of_tiny()
    assert found.elsewhere.startswith("8 GPUs of 80 GB") and "dsasr plan cluster" in found.elsewhere


@pytest.mark.parametrize(
    ("hours", "text"),
    [
        (0.12 / 3600, "0.12 s"),
        (0.005, "18 s"),
        (0.5, "30 min"),
        (3.25, "3.2 h"),
        (49.0, "2.0 days"),
        (24e3, "1,000.0 days"),
    ],
)
def test_times_in_words(hours, text):
    assert outlook.hours_text(hours) == text
