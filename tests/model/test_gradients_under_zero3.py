"""Weights that lie on two ranks: losses and gradients of a step are the whole model's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parents[1] / "programs" / "gradients.py"
RATES = [
    "stages.align.trains={adaptor: 0.0}",
    "stages.joint.trains={encoder: 0.0, adaptor: 0.0, llm: 0.0}",
]
ENCODER_LORA = [
    "model.encoder_lora={rank: 2, alpha: 6}",
    "stages.pretrain.trains={encoder_lora: 0.0, ctc: 0.0}",
    "stages.joint.trains={encoder_lora: 0.0, adaptor: 0.0, llm: 0.0}",
]
# name, stages, overrides. In align, the frames below the adaptor need no gradient.
CASES = [
    ("conv", ["align", "joint"], ["model.adaptor={kind: conv, hidden: 12}", *RATES]),
    ("qformer", ["align", "joint"], [
        "model.adaptor={kind: qformer, hidden: 12, heads: 3, stack: 6, queries: 2}", *RATES
    ]),
    ("ctc", ["align", "joint"], ["model.adaptor={kind: ctc, frames: true}", *RATES]),
    ("encoder_lora", ["pretrain", "joint"], ENCODER_LORA),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.launcher
def test_gradients_under_zero_3_are_the_whole_models(launch, tiny, tmp_path):
    done = launch(PROGRAM, tiny, tmp_path / "report.json", *map(json.dumps, CASES))
    assert done.returncode == 0, done.stdout[-3000:]
    report = json.loads((tmp_path / "report.json").read_text())
    assert list(report) == [f"{name} {stage}" for name, stages, _ in CASES for stage in stages]
    for name, (by_engine, whole) in report.items():
        assert by_engine == pytest.approx(whole, rel=1e-4), name
