"""Adaptors whose weights lie on two ranks: losses and gradients are the whole model's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parents[2] / "programs" / "adaptor_gradients.py"
ADAPTORS = (
    "{kind: conv, hidden: 12}",
    "{kind: qformer, hidden: 12, heads: 3, stack: 6, queries: 2}",
    "{kind: ctc, frames: true}",
)


@pytest.mark.slow
@pytest.mark.launcher
def test_gradients_under_zero_3_are_the_whole_models(launch, tiny, tmp_path):
    """Below a frozen encoder, whose frames need no gradient, and in the joint stage."""
    done = launch(PROGRAM, tiny, tmp_path / "report.json", *ADAPTORS)
    assert done.returncode == 0, done.stdout[-3000:]
    report = json.loads((tmp_path / "report.json").read_text())
    assert len(report) == 2 * len(ADAPTORS)
    for name, (by_engine, whole) in report.items():
        assert by_engine == pytest.approx(whole, rel=1e-4), name
