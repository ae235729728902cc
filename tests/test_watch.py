"""Looks during training: what they write, what they cost, and that they change nothing."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from dsasr import fragments, recipe
from dsasr.errors import UserError
from dsasr.recipe import WatchConfig
from dsasr.watch import Watch


def lines(folder: Path) -> list[dict]:
    return [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(folder: Path) -> dict:
    last = sorted((folder / "checkpoints").glob("step-*"))[-1]
    return fragments.verify(last)["files"]


@pytest.mark.launcher
def test_looks_on_two_ranks_change_nothing_and_are_logged(start, tmp_path):
    plain, watched = tmp_path / "plain", tmp_path / "watched"
    job = start(f"run={plain}")
    assert set(job.wait()) == {0}, job.output[-3000:]
    job = start(
        f"run={watched}", "allocation.every=5", "allocation.probes=2", "allocation.budget=1.0",
        "allocation.utterances=8", "evaluation.suite_utterances=3", "evaluation.every=20",
        "evaluation.suite.clips=1", "evaluation.suite.seconds=1.0",
    )  # fmt: skip
    assert set(job.wait()) == {0}, job.output[-3000:]
    assert weights(plain) == weights(watched)
    found = [x for x in lines(watched) if x["stage"].startswith("allocation_")]
    stages = {x["stage"].removeprefix("allocation_") for x in found}
    assert stages == {"pretrain", "align", "ia_sft", "joint"}
    assert all(0 <= x["nse"] <= 1 and 0 < x["allocation_share"] < 1 for x in found)
    joint = next(x for x in found if x["stage"] == "allocation_joint")
    assert joint["resolved"] == pytest.approx(joint["nll_without_audio"] - joint["nll_with_audio"])
    assert 0 < joint["cka_to_stage_start"] <= 1 and "ctc_entropy" in found[0]
    valid = [x for x in lines(watched) if x["stage"] == "valid_joint"][-1]
    assert 0 <= valid["hallucination/flagged"] <= 1
    assert valid["hallucination/silence/characters_per_minute"] >= 0


def watch(tmp_path, **given) -> Watch:
    return Watch(WatchConfig(every=1, **given), None, None, tmp_path)


def test_the_budget_is_kept(tmp_path):
    held = watch(tmp_path, budget=0.1)
    # Half of the share within a stage, all of it at a stage's end.
    held.costs = {"sft/cheap": 1.0, "sft/probes": 4.0}
    assert held._fits("sft", "cheap", False, 18.0) is None
    assert held._fits("sft", "cheap", False, 19.0) == "cheap"
    assert held._fits("sft", "cheap", True, 9.0) == "cheap"
    # Probes that do not fit give way to what is cheap.
    assert held._fits("sft", "probes", True, 35.0) == "cheap"
    assert held._fits("sft", "probes", True, 36.0) == "probes"
    held.seconds = 5.0
    assert held._fits("sft", "cheap", True, 40.0) is None


def test_a_look_that_does_not_fit_is_counted_and_kept(tmp_path):
    held = watch(tmp_path, budget=0.01)
    held.costs = {"sft/cheap": 10.0}
    branch = SimpleNamespace(name="sft", stage=SimpleNamespace(name="joint", steps=10))
    held.look_if_due(branch, SimpleNamespace(step=4), 5, 30.0)
    assert watch(tmp_path).left_out == 1 and watch(tmp_path).costs == {"sft/cheap": 10.0}


def test_settings_are_checked(tiny):
    with pytest.raises(UserError, match="budget"):
        recipe.load(str(tiny), ["allocation.budget=0"])
    with pytest.raises(UserError, match="utterances"):
        recipe.load(str(tiny), ["allocation.utterances=1"])
