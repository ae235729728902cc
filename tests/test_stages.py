from __future__ import annotations

import math
from dataclasses import replace

import pytest

from dsasr.stages import DriftConfig, PlannedSwap, StageConfig, learning_rate
from dsasr.utils.errors import UserError

ALIGN = StageConfig("align", "sft", {"adaptor": 1e-3}, steps=4)


def test_learning_rate_warms_up_and_decays():
    stage = StageConfig("s", "sft", {"llm": 2.0}, steps=110, warmup_steps=10, min_lr_ratio=0.1)
    rates = [learning_rate(stage, "llm", s) for s in range(110)]
    assert rates[0] == pytest.approx(0.2) and rates[9] == 2.0 and rates[10] == 2.0
    assert rates[60] == pytest.approx(2.0 * (0.1 + 0.9 * 0.5))
    assert rates[-1] == pytest.approx(2.0 * (0.1 + 0.45 * (1 + math.cos(math.pi * 0.99))))
    assert rates[10:] == sorted(rates[10:], reverse=True)
    flat = replace(stage, decay="constant", min_lr_ratio=0.0)
    assert learning_rate(flat, "llm", 109) == 2.0
    straight = replace(stage, decay="linear", min_lr_ratio=0.0)
    assert learning_rate(straight, "llm", 60) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"trains": {"adaptr": 1.0}}, "did you mean 'adaptor'"),
        ({"trains": {}}, "trains nothing"),
        ({"steps": 0}, "steps must be at least 1, not 0"),
        ({"warmup_steps": 4}, "below its 4 steps"),
        ({"objective": "ctc"}, "unknown objective"),
        ({"steps_after_final_swap": 5, "swaps": True}, "steps_after_final_swap is above its 4"),
        ({"steps_after_final_swap": 2}, "give it swaps=true"),
        ({"branch": "pretrain", "trains": {"encoder": 1e-3}, "swaps": True}, "in branch sft"),
        ({"decay": "constant", "min_lr_ratio": 0.5}, "no effect with decay=constant"),
        ({"trains": {"adaptor": -1.0}}, r"trains\.adaptor must be at least 0, not -1"),
        (
            {"trains": {"adaptor": math.nan}},
            r"trains\.adaptor must be at least 0 and finite, not nan",
        ),
        ({"trains": {"encoder": 1e-3, "layer_sum": 1e-3}}, "'encoder' trains 'layer_sum' too"),
        ({"trains": {"layer_sum": 1e-3}, "text_share": 1.0}, "text alone cannot train 'layer_sum'"),
        ({"grad_accum_steps": 0}, "grad_accum_steps must be at least 1"),
        ({"weight_decay": -0.1}, "weight_decay must be at least 0"),
    ],
)
def test_impossible_stages_are_refused(change, words):
    with pytest.raises(UserError, match=words):
        replace(ALIGN, **change)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"mode": "fixed"}, "needs drift.swaps"),
        ({"swaps": (PlannedSwap(5), PlannedSwap(4))}, "rising pretrain steps"),
        ({"swaps": (PlannedSwap(4, 9), PlannedSwap(5, 8))}, "do not fall"),
        ({"swaps": (PlannedSwap(4),)}, "no effect with drift.mode=cka"),
        ({"probe_utterances": 0}, "probe_utterances must be at least 1"),
        ({"interval": 0.0}, "interval must be above 0 and at most 1"),
        ({"threshold": math.nan}, "threshold must be from -1 to 1 and finite, not nan"),
    ],
)
def test_impossible_drift_is_refused(settings, words):
    with pytest.raises(UserError, match=words):
        DriftConfig(**settings)


def test_impossible_swaps_are_refused():
    for values, words in (((0,), "pretrain must be at least 1"), ((4, -1), "sft must be at least")):
        with pytest.raises(UserError, match=words):
            PlannedSwap(*values)
