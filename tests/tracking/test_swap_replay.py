"""A run's swaps as recipe overrides."""

from __future__ import annotations

import json

import pytest

from dsasr.tracking import swap_replay
from dsasr.tracking.run_log import EVENTS
from dsasr.utils.errors import UserError


def swap(pretrain: int, sft: int, cause: str = "drift") -> str:
    event = {"event": "swap", "cause": cause, "pretrain": pretrain, "sft": sft}
    return json.dumps(event) + "\n"


def test_the_last_swap_of_a_step_counts_and_an_external_encoder_does_not(tmp_path):
    events = [swap(0, 0, "given"), swap(5, 0), swap(9, 4), swap(12, 4), swap(20, 11, "final")]
    (tmp_path / EVENTS).write_text("".join(events))
    mode, drift, swaps = swap_replay.overrides(tmp_path)
    assert (mode, drift) == ("branch=both", "drift.mode=fixed")
    assert json.loads(swaps.removeprefix("drift.swaps=")) == [
        {"pretrain": 5, "sft": 0}, {"pretrain": 12, "sft": 4}, {"pretrain": 20, "sft": 11},
    ]  # fmt: skip


def test_a_folder_without_a_run_or_without_a_swap_is_refused(tmp_path):
    with pytest.raises(UserError, match="no run folder"):
        swap_replay.overrides(tmp_path)
    (tmp_path / EVENTS).write_text('{"event": "stage", "steps": 0}\n{"event": "sw')
    with pytest.raises(UserError, match="no history"):
        swap_replay.overrides(tmp_path)
