"""A short soak test, and its checks on runs with known differences."""

from __future__ import annotations

import json
import multiprocessing
import random
import shutil
import signal
import time

import pytest
import torch

from dsasr import recipe
from dsasr.checkpoint import tensor_fragments
from dsasr.checkpoint.tensor_fragments import Fragment
from dsasr.testing import soak, soak_check, soak_job
from dsasr.tracking.run_log import LEDGER, METRICS
from dsasr.utils.errors import UserError


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def finished_run(folder, value: float = 1.0, nll: float = 2.0, streams: int = 0, key: str = "c"):
    """A run folder with the last checkpoint, metrics and ledger."""
    fragments = {"sft/w": Fragment((3,), 0, torch.tensor([1.0, 2.0, value]))}
    info = {"steps": 4, "progress": {"sft": 4}, "streams": {"sft": streams}, "branches": {}}
    tensor_fragments.write_folder(folder / "checkpoints" / "step-0000000004", fragments, info)
    metrics = [{"steps": 3, "nll": 2.5}, {"steps": 4, "nll": nll, "step_seconds": value}]
    write(folder / METRICS, metrics)
    write(folder / LEDGER, [{"steps": 4, "branch": "sft", "samples": [[[0, ["a", key]]]]}])
    return folder


def test_differences_are_found_in_weights_streams_losses_and_samples(tmp_path):
    baseline = finished_run(tmp_path / "baseline")
    differences = soak_check.differences
    assert differences(baseline, finished_run(tmp_path / "same")) == []
    assert differences(baseline, finished_run(tmp_path / "w", value=1.0000001)) == ["sft/w"]
    problems = differences(baseline, finished_run(tmp_path / "n", nll=2.0000001))
    assert problems == ["line 2 of the metrics: nll"]
    problems = differences(baseline, finished_run(tmp_path / "s", streams=1))
    assert problems == ["streams of the last checkpoint"]
    assert differences(baseline, finished_run(tmp_path / "l", key="d")) == [
        "line 1 of the ledger: samples"
    ]
    assert soak_check.sft_differences(baseline, finished_run(tmp_path / "r", key="d"))
    assert soak_check.sft_differences(baseline, tmp_path / "same") == []
    shutil.rmtree(tmp_path / "same" / "checkpoints")
    assert "no whole checkpoint" in differences(baseline, tmp_path / "same")[0]


def ledger_rows(cfg, keys, per_step: int = 13):
    """A ledger without faults: each stage goes over ``keys`` on two ranks until its last step."""
    rows, total = [], 0
    for stage in cfg.stages:
        for step in range(1, stage.steps + 1):
            total += 1
            epoch, start = divmod((step - 1) * per_step, len(keys))
            step_keys = keys[start : start + per_step]
            samples = [[[epoch, step_keys[:6]]], [[epoch, step_keys[6:]]]]
            head = {"steps": total, "branch": stage.branch, "stage": stage.name, "step": step}
            rows.append(head | {"samples": samples})
    return rows


def test_a_ledger_check_finds_repeated_unknown_and_missing_samples(tiny, tmp_path):
    cfg = recipe.load(str(tiny), [f"run={tmp_path}"])
    keys = sorted(soak_check.sample_keys(cfg.data.train[0].shards))
    assert len(keys) == 52
    rows = ledger_rows(cfg, keys)

    def faults(rows) -> str:
        write(tmp_path / LEDGER, rows)
        return "; ".join(soak_check.check_ledger(tmp_path, cfg).faults)

    assert faults(rows) == ""
    check = soak_check.check_ledger(tmp_path, cfg)
    assert (check.steps, check.samples, check.epochs) == (42, 42 * 13, 4 + 3)
    assert "no ledger" in faults([])
    assert "not 1, 2, 3" in faults([*rows[:5], rows[4], *rows[5:]])  # a repeated step
    assert "pretrain lacks steps" in faults([*rows[:5], *rows[6:]])
    faulty = json.loads(json.dumps(rows))
    faulty[1]["samples"][0][0][1][0] = keys[0]  # repeated, in the place of another
    assert "pretrain, epoch 0: 1 repeated (" + keys[0] in faults(faulty)
    assert "pretrain, epoch 0: 1 missing (" + keys[13] in faults(faulty)
    faulty[1]["samples"][0][0][1][0] = "nobody"
    assert "unknown (nobody" in faults(faulty)
    # A sample in the log of bad samples is not missing.
    del faulty[1]["samples"][0][0][1][0]
    write(tmp_path / "bad_samples.jsonl", [{"key": keys[13]}])
    assert "epoch 0" not in faults(faulty)


def test_kill_plans_have_all_phases_and_targets():
    kill_plans = soak.plan_kills(["both"], 32, random.Random(0))
    assert {phase for _, phase in kill_plans["both"]} == set(soak.PHASES)
    assert {target for target, _ in kill_plans["both"]} == set(soak.TARGETS)
    pair = soak.plan_kills(["pretrain", "sft"], 31, random.Random(0))
    assert len(pair["pretrain"]) + len(pair["sft"]) == 31
    assert "swap" not in {phase for _, phase in pair["pretrain"]}


def test_a_used_folder_is_refused(tmp_path):
    (tmp_path / "baseline").mkdir()
    with pytest.raises(UserError, match="new folder"):
        soak.soak("demo", [], tmp_path, kills=1, world=1, seed=0)


def test_a_rank_that_waits_for_a_killed_one_is_killed_as_by_the_launcher(tmp_path, monkeypatch):
    monkeypatch.setattr(soak_job, "SURVIVOR_SECONDS", 0.2)
    monkeypatch.setattr(soak_job.Job, "_fork", lambda job, arguments: None)
    plan = soak_job.PausePlan(folder=str(tmp_path / "start"))
    job = soak_job.Job([], 2, tmp_path / "log", plan)
    job._ranks = [multiprocessing.Process(target=time.sleep, args=(60,)) for _ in range(2)]
    for rank in job._ranks:
        rank.start()
    job.kill("rank")
    assert job.wait(20.0) == [-signal.SIGKILL] * 2


@pytest.mark.slow
@pytest.mark.launcher
def test_kills_in_a_save_in_a_swap_and_of_the_launcher(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    reports: list[str] = []
    short = ["stages.pretrain.steps=8", "stages.ia_sft.steps=6", "stages.joint.steps=2",
             "checkpoint.every_steps=3"]  # fmt: skip
    kills = [("rank", "save"), ("launcher", "step"), ("node", "swap")]
    result = soak.soak(
        str(tiny), short, tmp_path / "soak", kills=3, world=2, seed=3,
        kill_plans={"both": kills}, report=reports.append,
    )  # fmt: skip
    assert not result.faults, result.faults
    assert result.kills_by(1) == {"rank": 1, "launcher": 1, "node": 1}
    assert {"save", "swap"} <= set(result.kills_by(2)), result
    assert (result.starts, result.steps) == (4, 20) and result.epochs >= 1, result
    assert reports[-1] == "comparing"
