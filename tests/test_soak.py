"""The soak in small: two kills, and a comparison that can see what differs."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from dsasr import fragments, soak
from dsasr.errors import UserError
from dsasr.fragments import Fragment


def ended(folder, value: float = 1.0, nll: float = 2.0, streams: int = 0, keys=("e",)):
    """A run folder at its end."""
    held = {"sft/w": Fragment((3,), 0, torch.tensor([1.0, 2.0, value]))}
    info = {"steps": 4, "progress": {"sft": 4}, "streams": {"sft": streams}, "branches": {}}
    fragments.write_folder(folder / "checkpoints" / "step-0000000004", held, info)
    lines = [{"steps": 3, "nll": 2.5}, {"steps": 4, "nll": nll, "step_seconds": value}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    ledger = [line(3, ["a", "b"], ["c"]), line(4, keys, ["d"])]
    (folder / "ledger.jsonl").write_text("".join(json.dumps(x) + "\n" for x in ledger))
    return folder


def line(steps: int, *of_ranks: list[str], epoch: int = 0, stage: str = "joint") -> dict:
    return {"steps": steps, "stage": stage, "samples": [[[epoch, keys]] for keys in of_ranks]}


def test_a_comparison_sees_weights_cursors_and_losses(tmp_path):
    calm = ended(tmp_path / "calm")
    assert soak.differences(calm, ended(tmp_path / "same")) == []
    assert soak.differences(calm, ended(tmp_path / "w", value=1.0000001)) == ["sft/w"]
    found = soak.differences(calm, ended(tmp_path / "n", nll=2.0000001))
    assert found == ["line 2 of the metrics: nll"]
    found = soak.differences(calm, ended(tmp_path / "s", streams=1))
    assert found == ["streams of the last checkpoint"]
    found = soak.differences(calm, ended(tmp_path / "k", keys=("c",)))
    assert found == ["the ledger of samples", "joint, epoch 0: 1 samples twice: c …"]
    shutil.rmtree(tmp_path / "same" / "checkpoints")
    assert "no whole checkpoint" in soak.differences(calm, tmp_path / "same")[0]


def test_a_ledger_tells_what_came_twice_or_not_at_all():
    first, second = line(1, ["a", "b"], ["c"]), line(2, ["c"], ["a", "b"], epoch=1)
    assert soak.repeated([first, second, line(3, ["a"], epoch=0, stage="align")]) == []
    assert soak.repeated([first, line(2, ["d"], epoch=1)]) == [
        "joint, epoch 0: 1 samples missing: d …"
    ]
    assert soak.repeated([first, line(2, ["d", "d"], epoch=1), second])[0].endswith("missing: d …")
    assert "epoch 1: 1 samples twice: d" in soak.repeated([line(2, ["d"], ["d"], epoch=1)])[0]


def test_a_used_folder_is_refused(tmp_path):
    (tmp_path / "calm").mkdir()
    with pytest.raises(UserError, match="new folder"):
        soak.soak("demo", [], tmp_path, kills=1, world=1, seed=0)


@pytest.mark.launcher
def test_two_kills(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(soak, "MOMENTS", {"swap": "— swap:", "step": r"\] pretrain 6"})
    told: list[str] = []
    short = ["stages.pretrain.steps=8", "stages.ia_sft.steps=6", "stages.joint.steps=2",
             "checkpoint.every_steps=3"]  # fmt: skip
    verdict = soak.soak(
        str(tiny),
        short,
        tmp_path / "soak",
        kills=2,
        world=1,
        seed=3,
        linger=False,
        tell=told.append,
    )
    assert not verdict.faults, verdict.faults
    assert (sum(verdict.kills.values()), verdict.starts) == (2, 3), verdict
    assert told[-1] == "comparing"
