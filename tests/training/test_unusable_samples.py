"""Steps without a usable sample, evaluations that fail, and what is saved before them."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest
import torch

from dsasr.data.batch import Batch
from dsasr.engine.step_report import StepReport
from dsasr.tracking.run_log import read_events, read_metrics
from dsasr.training import trainer as trainer_module
from dsasr.training import validation as validation_module
from dsasr.utils.errors import UserError

BAD = ("decode_error", "s.tar", "k", "torn")


def report(step: int, value: float = 1.0, count: float = 0.0) -> StepReport:
    """A pretrain step; without ``count`` all its samples were dropped."""
    sums = {"ctc": (torch.tensor(value * count), torch.tensor(count))}
    batch = Batch.blank(torch.zeros(int(count), 8, 80), bad=() if count else (BAD,))
    return StepReport(
        "pretrain", "pretrain", step, sums, {"ctc": 1e-3}, torch.tensor(0.0), (batch,)
    )


@pytest.fixture
def run(trainer_of, tmp_path):
    one = trainer_of(tmp_path / "run", "monitor.every=1", "stages.pretrain.steps=200")

    def log(step: int, **fields) -> None:
        one.bad_samples.add([] if fields.get("count") else [BAD], steps=step)
        one.log(report(step, **fields))

    one.log_step = log
    return one


def test_a_step_whose_samples_are_all_bad_is_no_divergence(run, capsys):
    for step in range(20):
        run.log_step(step, count=float(step % 10 == 0))
    lines = read_metrics(run.recipe.folder)
    lines = [line for line in lines if line["stage"] == "pretrain"]
    assert [line.get("ctc") for line in lines[:2]] == [1.0, None] and "ctc" not in lines[1]
    assert "no usable sample" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"not finite.*a lower rate"):
        run.log_step(20, value=math.nan, count=1.0)


def test_a_run_without_usable_samples_ends_with_their_cause(run):
    words = (
        "no usable sample in the last 50 steps.*decode_error.*k in s.tar: torn.*bad_samples.jsonl"
    )
    with pytest.raises(UserError, match=words):
        for step in range(trainer_module.EMPTY_STEPS):
            run.log_step(step)
    assert step == trainer_module.EMPTY_STEPS - 1


def test_a_stage_that_saw_no_usable_sample_is_not_done(trainer_of, tmp_path):
    one = trainer_of(tmp_path / "run", "stages.pretrain.steps=4", "stages.pretrain.warmup_steps=0")
    for step in range(3):
        one.log(report(step))
    with pytest.raises(UserError, match="no usable sample in the last 4 steps"):
        one.log(report(3))


BRANCH = SimpleNamespace(name="pretrain", stage=SimpleNamespace(name="pretrain"))


def failing(*_: object) -> None:
    raise RuntimeError("CUDA out of memory\nat http://me:secret@host/x\x1b")


def test_an_evaluation_that_fails_is_named_and_ends_no_run(run, monkeypatch, capsys):
    monkeypatch.setattr(validation_module, "error_rates", failing)
    run.validation.evaluate(BRANCH, 0, steps=7)
    (event,) = [e for e in read_events(run.recipe.folder) if e["event"] == "evaluation_failed"]
    assert event["steps"] == 7 and "RuntimeError: CUDA out of memory" in event["reason"]
    assert "training goes on" in capsys.readouterr().out
    assert run.validation.score(7) is None and not run.validation.is_best(7)


def test_bad_validation_samples_are_named(run, monkeypatch, capsys):
    rates = {"wer": 0.5, "left_out": 1.0}
    monkeypatch.setattr(validation_module, "error_rates", lambda *_: (rates, "", [BAD]))
    run.validation.evaluate(BRANCH, 0, steps=7)
    (row,) = (run.recipe.folder / validation_module.BAD_SAMPLES).read_text().splitlines()
    row = json.loads(row)
    assert (row["cause"], row["shard"], row["key"]) == BAD[:3] and row["steps"] == 7
    assert "left out: 1 (decode_error 1); the first: k in s.tar: torn" in capsys.readouterr().out
    assert run.validation.score(7) == 0.5
    monkeypatch.setattr(validation_module, "error_rates", lambda *_: ({"wer": math.nan}, "", []))
    run.validation.evaluate(BRANCH, 0, steps=8)
    assert run.validation.score(8) is None and run.validation.best == 0.5


def test_a_validation_set_without_a_usable_sample(run, monkeypatch):
    empty = Batch.blank(torch.zeros(0, 0, 80), bad=(BAD,))
    monkeypatch.setattr(type(run.builder), "validation_batches", lambda *_: [empty])
    run.validation.evaluate(BRANCH, 0, steps=3)
    (event,) = [e for e in read_events(run.recipe.folder) if e["event"] == "evaluation_failed"]
    assert "the validation set has no usable sample: all 1 were dropped" in event["reason"]


def test_the_last_step_is_saved_before_the_last_evaluation(run, monkeypatch):
    done = []
    run.branches = [SimpleNamespace(name="pretrain", stage=BRANCH.stage)]
    monkeypatch.setattr(run, "_evaluate", lambda *_: done.append("evaluate"))
    monkeypatch.setattr(run, "save", lambda: done.append(f"finished={run._finished}") or True)
    monkeypatch.setattr(run, "_plot", lambda: None)
    run.finish()
    assert done == ["finished=False", "evaluate", "finished=True"]
