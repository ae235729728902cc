"""The lines of a cluster plan: numbers that say something of small and of large runs."""

from __future__ import annotations

import datetime

import pytest

from dsasr import recipe
from dsasr.planning import cluster_sizing, cluster_table
from dsasr.planning.cluster_sizing import StepCost
from dsasr.planning.memory import Machine, Traffic

DAY = datetime.date(2026, 1, 1)


@pytest.fixture
def plan(monkeypatch, tiny):
    """``plan(seconds, steps)``: lines for the tiny recipe's last stage, whose step on one GPU takes
    ``seconds``."""

    def lines(seconds: float, steps: int) -> list[str]:
        def estimate(recipe, stage, machine, traffic, parts) -> StepCost:
            return StepCost("joint", steps, {"weights": 0.01}, 1e9, seconds, 0.0, 0.0, 0.0, 0.0,
                            0.0004)  # fmt: skip

        monkeypatch.setattr(cluster_sizing, "estimate_step", estimate)
        cfg = recipe.load(str(tiny))
        machine = Machine(1, 1)
        return list(cluster_table.cluster_plan(cfg, cfg.stages[-1:], machine, Traffic(), DAY))

    return lines


def row(lines: list[str], head: str) -> list[str]:
    """The cells of the row below the line that has the word ``head``."""
    joined = "\n".join(lines).splitlines()
    return joined[next(i for i, line in enumerate(joined) if head in line) + 1].split()


def test_a_small_run_has_no_zeros(plan):
    lines = plan(0.00025, 400)  # 0.1 s on one GPU: 2.78e-05 GPU-hours
    cells = row(lines, "GPU-hours")
    assert cells[:4] == ["joint", "400", "0.00025", "0.00025"]
    assert cells[6:] == ["0.0004", "0.1", "s", "2.78e-05", "products"]
    assert any("0.1 s, 2.78e-05 GPU-hours" in line for line in lines)
    # 0.0004 h of audio in 0.00025 s.
    assert row(lines, "h audio/GPU-h")[2:5] == ["0.00025", "0.0004", "5,760"]
    assert all(line == line.rstrip() for line in "\n".join(lines).splitlines())


def test_a_large_run_has_days_and_whole_hours(plan):
    lines = plan(2.0, 4_000_000)  # 8e6 s: 92.6 days, 2,222 hours on one GPU
    assert row(lines, "GPU-hours")[7:10] == ["92.6", "days", "2,222"]
    assert any("from 2026-01-01 to 2026-04-03: 92.6 days, 2,222 GPU" in line for line in lines)
