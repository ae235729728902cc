"""Same data, same step: ranks and micro-batches of very different targets make one batch's step."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parents[1] / "programs" / "same_step.py"


@pytest.mark.launcher
@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_shared_step_is_that_of_one_batch(launch, tiny, tmp_path, ranks):
    out = tmp_path / "found.json"
    done = launch(PROGRAM, tiny, out, ranks=ranks)
    assert done.returncode == 0, done.stdout[-3000:]
    found = json.loads(out.read_text())
    assert list(found) == ["ctc", "ctc accumulated", "align", "joint", "joint accumulated"]
    for name, case in found.items():
        assert case["moved"] > 5e-3, name
        # With a mean of each micro-batch instead (on one rank, accumulated) norms differ by 0.3 to
        # 0.5, and weights by up to 0.02.
        assert case["difference"] < 1e-6, (name, case)
        assert case["loss"] < 1e-6 and case["norm"] < 1e-5, (name, case)
