"""Looks during training: what they write, what they cost, and that they change nothing."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from dsasr import recipe
from dsasr.analysis import probed_encoders
from dsasr.checkpoint import tensor_fragments
from dsasr.entropy_allocation.cka import cka
from dsasr.evaluation.eval_sets import read_recordings
from dsasr.recipe import OnlineProbeConfig
from dsasr.stages import StageConfig
from dsasr.training.online_probe import OnlineProbe
from dsasr.utils.errors import UserError


def lines(folder: Path) -> list[dict]:
    return [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(folder: Path) -> dict:
    last = sorted((folder / "checkpoints").glob("step-*"))[-1]
    return tensor_fragments.verify(last)["files"]


@pytest.mark.launcher
def test_looks_on_two_ranks_change_nothing_and_are_logged(start, tiny, tmp_path):
    plain, watched = tmp_path / "plain", tmp_path / "watched"
    late = (
        "stages.ia_sft.swaps=false",
        "stages.ia_sft.steps_after_final_swap=0",
    )  # the joint stage swaps
    job = start(f"run={plain}", *late)
    assert set(job.wait()) == {0}, job.output[-3000:]
    job = start(
        f"run={watched}", *late, "probe.every=5", "probe.probes=2",
        "probe.budget=1.0", "probe.utterances=8", "evaluation.suite_utterances=3",
        "evaluation.every=20", "evaluation.suite.clips=1", "evaluation.suite.seconds=1.0",
    )  # fmt: skip
    assert set(job.wait()) == {0}, job.output[-3000:]
    assert weights(plain) == weights(watched)
    found = [x for x in lines(watched) if x["stage"].startswith("allocation_")]
    stages = {x["stage"].removeprefix("allocation_") for x in found}
    assert stages == {"pretrain", "align", "ia_sft", "joint"}
    assert all(0 <= x["nse"] <= 1 and 0 < x["allocation_share"] < 1 for x in found)
    joint = next(x for x in found if x["stage"] == "allocation_joint")
    assert joint["resolved"] == pytest.approx(joint["nll_without_audio"] - joint["nll_with_audio"])
    assert "ctc_entropy" in found[0]
    against = {x["stage"] for x in found if "cka_to_stage_start" in x}
    assert against == {"allocation_pretrain", "allocation_joint"}
    assert 0 < joint["cka_to_stage_start"] <= 1
    # The joint stage took the final encoder as it began: that is what it is compared with.
    swaps = [json.loads(x) for x in (watched / "events.jsonl").read_text().splitlines()]
    [last] = [x for x in swaps if x["event"] == "swap" and x["stage"] == "joint"]
    final = probed_encoders.open_checkpoint(watched / "snapshots" / last["snapshot"])
    shown = final.encode(read_recordings(str(tiny.parent / "valid"))[0])
    began = load_file(watched / "allocation" / "start-joint.safetensors")
    assert began.keys() == shown.keys()
    for key, frames in began.items():
        torch.testing.assert_close(frames, shown[key], rtol=1e-3, atol=1e-4)
    valid = [x for x in lines(watched) if x["stage"] == "valid_joint"][-1]
    assert 0 <= valid["hallucination/flagged"] <= 1
    assert valid["hallucination/silence/characters_per_minute"] >= 0


def watch(tmp_path, **given) -> OnlineProbe:
    return OnlineProbe(OnlineProbeConfig(every=1, **given), None, None, tmp_path)


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


class Shown:
    """A probe set's batch, of two utterances of 30 and 20 frames."""

    keys = ("a", "b")
    features_BTF = torch.randn(2, 30, 6, generator=torch.Generator().manual_seed(0))
    feature_lengths_B = torch.tensor([30, 20])

    def __len__(self):
        return 2

    def to(self, _device):
        return self


class Linear:
    """A branch whose encoder is a matrix."""

    name = "sft"

    def __init__(self, stage: str, trains: str):
        self.stage = StageConfig(stage, "sft", {trains: 1e-3}, 10)
        self.weight = torch.eye(6)

    @contextlib.contextmanager
    def evaluating(self):
        yield SimpleNamespace(
            encoder=lambda x, lengths: SimpleNamespace(
                frames_BSE=x @ self.weight, lengths_B=lengths
            )
        )

    def frames(self) -> dict[str, torch.Tensor]:
        x = Shown.features_BTF @ self.weight
        return {"a": x[0], "b": x[1, :20]}


def looking(tmp_path, **given) -> OnlineProbe:
    held = watch(tmp_path, **given)
    held._probe = {"sft": [Shown()]}
    return held


def test_cka_is_to_the_encoder_that_the_stage_began_with(tmp_path):
    held, joint = looking(tmp_path, budget=1e-9), Linear("joint", "encoder")
    joint.weight[0, 0] = 3.0  # as a swap at the stage's entry would leave it
    assert held.begin(joint, 0) > 0
    began, seconds = joint.frames(), held.seconds
    # A look that the budget drops, a later step and a resumed run change nothing of it.
    held.costs = {"sft/cheap": 10.0}
    joint.weight = torch.randn(6, 6, generator=torch.Generator().manual_seed(1))
    held.look_if_due(joint, SimpleNamespace(step=0), 5, 30.0)
    assert held.begin(joint, 1) == 0 and held.left_out == 1
    again = looking(tmp_path)
    assert again.seconds == seconds > 0
    now = joint.frames()
    found = again._measure(joint.stage, now, [], False)
    expected = cka(torch.cat(list(began.values())), torch.cat(list(now.values())))
    assert found["cka_to_stage_start"] == pytest.approx(expected) and expected < 0.95
    assert again._measure(joint.stage, began, [], False)["cka_to_stage_start"] == pytest.approx(1)
    # Of utterances that were not shown at the start nothing is said.
    assert "cka_to_stage_start" not in again._measure(joint.stage, {"c": now["a"]}, [], False)
    # Another attempt at the first step takes it anew; another stage has its own.
    other = Linear("late/joint", "encoder")
    assert "cka_to_stage_start" not in again._measure(other.stage, now, [], False)
    for branch in (joint, other):
        assert again.begin(branch, 0) > 0
        found = again._measure(branch.stage, branch.frames(), [], False)
        assert found["cka_to_stage_start"] == pytest.approx(1)


def test_a_stage_that_leaves_the_encoder_alone_has_no_cka(tmp_path):
    held, align = looking(tmp_path), Linear("align", "adaptor")
    assert held.begin(align, 0) == 0 and held.seconds == 0 and not list(tmp_path.iterdir())
    assert "cka_to_stage_start" not in held._measure(align.stage, align.frames(), [], False)
    off = OnlineProbe(OnlineProbeConfig(every=0), None, None, tmp_path)
    assert off.begin(Linear("joint", "encoder"), 0) == 0


def test_what_is_not_finite_is_left_out(tmp_path):
    held, joint = looking(tmp_path), Linear("joint", "encoder")
    joint.weight[:] = float("nan")
    assert held._measure(joint.stage, joint.frames(), [], False) == {}
    joint.weight[:] = 0.0
    held.begin(joint, 0)
    assert "cka_to_stage_start" not in held._measure(joint.stage, joint.frames(), [], False)


def test_a_look_that_does_not_fit_is_counted_and_kept(tmp_path):
    held = watch(tmp_path, budget=0.01)
    held.costs = {"sft/cheap": 10.0}
    branch = SimpleNamespace(name="sft", stage=SimpleNamespace(name="joint", steps=10))
    held.look_if_due(branch, SimpleNamespace(step=4), 5, 30.0)
    assert watch(tmp_path).left_out == 1 and watch(tmp_path).costs == {"sft/cheap": 10.0}


def test_settings_are_checked(tiny):
    with pytest.raises(UserError, match="budget"):
        recipe.load(str(tiny), ["probe.budget=0"])
    with pytest.raises(UserError, match="utterances"):
        recipe.load(str(tiny), ["probe.utterances=1"])
