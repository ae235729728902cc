"""Probe evaluations during training: what they write and cost, and that they change nothing."""

from __future__ import annotations

import contextlib
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from dsasr import recipe
from dsasr.analysis import probed_encoders
from dsasr.checkpoint import tensor_fragments
from dsasr.entropy_allocation.allocation_row import AllocationRow, EncoderSource
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


@pytest.mark.slow
@pytest.mark.launcher
def test_evaluations_on_two_ranks_change_nothing_and_are_logged(start, tiny, tmp_path):
    plain, probed = tmp_path / "plain", tmp_path / "probed"
    late = (
        "stages.ia_sft.swaps=false",
        "stages.ia_sft.steps_after_final_swap=0",
    )  # the joint stage swaps
    job = start(f"run={plain}", *late)
    assert set(job.wait()) == {0}, job.output[-3000:]
    job = start(
        f"run={probed}", *late, "probe.every=5", "probe.probes=2",
        "probe.budget=1.0", "probe.utterances=8", "evaluation.suite_utterances=3",
        "evaluation.every=20", "evaluation.suite.clips=1", "evaluation.suite.seconds=1.0",
    )  # fmt: skip
    assert set(job.wait()) == {0}, job.output[-3000:]
    assert weights(plain) == weights(probed)
    rows = [x for x in lines(probed) if x["stage"].startswith("allocation_")]
    stages = {x["stage"].removeprefix("allocation_") for x in rows}
    assert stages == {"pretrain", "align", "ia_sft", "joint"}
    assert all(0 <= x["nse"] <= 1 and 0 < x["probe_time_share"] < 1 for x in rows)
    joint = next(x for x in rows if x["stage"] == "allocation_joint")
    resolved = joint["llm_nll_without_audio"] - joint["llm_nll_with_audio"]
    assert joint["llm_resolved"] == pytest.approx(resolved)
    assert "ctc_entropy" in rows[0] and "ctc" in rows[0]
    compared = {x["stage"] for x in rows if "cka_to_reference" in x}
    assert compared == {"allocation_pretrain", "allocation_joint"}
    assert 0 < joint["cka_to_reference"] <= 1
    # The joint stage began with the final encoder, its reference.
    swaps = [json.loads(x) for x in (probed / "events.jsonl").read_text().splitlines()]
    [last] = [x for x in swaps if x["event"] == "swap" and x["stage"] == "joint"]
    final = probed_encoders.open_checkpoint(probed / "snapshots" / last["snapshot"])
    features = final.encode(read_recordings(str(tiny.parent / "valid"))[0])
    reference = load_file(probed / "allocation" / "start-joint.safetensors")
    assert reference.keys() == features.keys()
    for key, frames in reference.items():
        torch.testing.assert_close(frames, features[key], rtol=1e-3, atol=1e-4)
    valid = [x for x in lines(probed) if x["stage"] == "valid_joint"][-1]
    assert 0 <= valid["hallucination/flagged"] <= 1
    assert valid["hallucination/silence/characters_per_minute"] >= 0


def online_probe(tmp_path, **settings) -> OnlineProbe:
    return OnlineProbe(OnlineProbeConfig(every=1, **settings), None, None, tmp_path)


def test_evaluations_stay_within_the_budget(tmp_path):
    probe = online_probe(tmp_path, budget=0.1)
    # Half of the share within a stage, all of it at a stage's end.
    probe.costs = {"sft/cheap": 1.0, "sft/probes": 4.0}
    assert probe._affordable("sft", "cheap", False, 18.0) is None
    assert probe._affordable("sft", "cheap", False, 19.0) == "cheap"
    assert probe._affordable("sft", "cheap", True, 9.0) == "cheap"
    # Without the budget for probes the evaluation is a cheap one.
    assert probe._affordable("sft", "probes", True, 35.0) == "cheap"
    assert probe._affordable("sft", "probes", True, 36.0) == "probes"
    probe.seconds = 5.0
    assert probe._affordable("sft", "cheap", True, 40.0) is None


class ProbeBatch:
    """A batch of two utterances of 30 and 20 frames."""

    keys = ("a", "b")
    features_BTF = torch.randn(2, 30, 6, generator=torch.Generator().manual_seed(0))
    feature_lengths_B = torch.tensor([30, 20])

    def __len__(self):
        return 2

    def to(self, _device):
        return self

    def or_silence(self, _shape):
        return self


class LinearEncoder:
    bins, front_end = 6, None

    def __init__(self, weight: torch.Tensor):
        self.weight = weight

    def __call__(self, x_BTF, lengths_B):
        return SimpleNamespace(frames_BSE=x_BTF @ self.weight, lengths_B=lengths_B)


class Linear:
    """A branch whose encoder is a matrix."""

    name = "sft"

    def __init__(self, stage: str, trains: str):
        self.stage = StageConfig(stage, "sft", {trains: 1e-3}, 10)
        self.weight = torch.eye(6)

    @contextlib.contextmanager
    def evaluating(self):
        yield SimpleNamespace(encoder=LinearEncoder(self.weight))

    def frames(self) -> dict[str, torch.Tensor]:
        x = ProbeBatch.features_BTF @ self.weight
        return {"a": x[0], "b": x[1, :20]}


def with_batch(tmp_path, **settings) -> OnlineProbe:
    probe = online_probe(tmp_path, **settings)
    probe._probe_batches = {"sft": [ProbeBatch()]}
    return probe


def measured(probe: OnlineProbe, branch: Linear, features=None) -> AllocationRow:
    row = AllocationRow(EncoderSource("x", "live"))
    frames = branch.frames() if features is None else features
    return probe._measure(row, branch.stage, frames, [], False)


def test_cka_is_to_the_encoder_that_the_stage_began_with(tmp_path):
    probe, joint = with_batch(tmp_path, budget=1e-9), Linear("joint", "encoder")
    joint.weight[0, 0] = 3.0  # as a swap at the stage's start would leave it
    assert probe.take_reference(joint, 0) > 0
    start, seconds = joint.frames(), probe.seconds
    # An evaluation beyond the budget, a later step and a resumed run change nothing of it.
    probe.costs = {"sft/cheap": 10.0}
    joint.weight = torch.randn(6, 6, generator=torch.Generator().manual_seed(1))
    probe.evaluate(joint, 0, 5, 30.0)
    assert probe.take_reference(joint, 1) == 0 and probe.left_out == 1
    resumed = with_batch(tmp_path)
    assert resumed.seconds == seconds > 0
    now = joint.frames()
    row = measured(resumed, joint)
    expected = cka(torch.cat(list(start.values())), torch.cat(list(now.values())))
    assert row.cka_to_reference == pytest.approx(expected) and expected < 0.95
    assert row.reference == "stage start"
    assert measured(resumed, joint, start).cka_to_reference == pytest.approx(1)
    # Utterances without a reference have no CKA.
    assert math.isnan(measured(resumed, joint, {"c": now["a"]}).cka_to_reference)
    # Another attempt at the first step takes it anew; another stage has its own.
    other = Linear("late.joint", "encoder")
    assert math.isnan(measured(resumed, other, now).cka_to_reference)
    for branch in (joint, other):
        assert resumed.take_reference(branch, 0) > 0
        assert measured(resumed, branch).cka_to_reference == pytest.approx(1)


def test_a_stage_that_does_not_train_the_encoder_has_no_cka(tmp_path):
    probe, align = with_batch(tmp_path), Linear("align", "adaptor")
    assert probe.take_reference(align, 0) == 0 and probe.seconds == 0
    assert not list(tmp_path.iterdir())
    assert math.isnan(measured(probe, align).cka_to_reference)
    off = OnlineProbe(OnlineProbeConfig(every=0), None, None, tmp_path)
    assert off.take_reference(Linear("joint", "encoder"), 0) == 0


def test_what_is_not_finite_is_left_out(tmp_path):
    probe, joint = with_batch(tmp_path), Linear("joint", "encoder")
    joint.weight[:] = float("nan")
    assert measured(probe, joint).scalars() == {}
    joint.weight[:] = 0.0
    probe.take_reference(joint, 0)
    assert "cka_to_reference" not in measured(probe, joint).scalars()


def test_an_evaluation_that_does_not_fit_is_counted_and_stored(tmp_path):
    probe = online_probe(tmp_path, budget=0.01)
    probe.costs = {"sft/cheap": 10.0}
    branch = SimpleNamespace(name="sft", stage=SimpleNamespace(name="joint", steps=10))
    probe.evaluate(branch, 4, 5, 30.0)
    resumed = online_probe(tmp_path)
    assert resumed.left_out == 1 and resumed.costs == {"sft/cheap": 10.0}


def test_settings_are_checked(tiny):
    with pytest.raises(UserError, match="budget"):
        recipe.load(str(tiny), ["probe.budget=0"])
    with pytest.raises(UserError, match="utterances"):
        recipe.load(str(tiny), ["probe.utterances=1"])
