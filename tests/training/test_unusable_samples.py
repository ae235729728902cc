"""Steps without a usable sample, evaluations that fail, and what is saved before them."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from dsasr.checkpoint.tensor_fragments import Fragment
from dsasr.data.batch import Batch
from dsasr.engine.step_report import StepReport
from dsasr.tracking.run_log import read_events, read_metrics
from dsasr.training import validation as validation_module
from dsasr.training.dropped_samples import EMPTY_STEPS
from dsasr.training.trainer import Trainer
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
        for step in range(EMPTY_STEPS):
            run.log_step(step)
    assert step == EMPTY_STEPS - 1


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
    run.evaluation.validation.evaluate(BRANCH, 0, steps=7)
    (event,) = [e for e in read_events(run.recipe.folder) if e["event"] == "evaluation_failed"]
    assert event["steps"] == 7 and "RuntimeError: CUDA out of memory" in event["reason"]
    assert "training goes on" in capsys.readouterr().out
    assert run.evaluation.validation.score(7) is None and not run.evaluation.validation.is_best(7)


def test_bad_validation_samples_are_named(run, monkeypatch, capsys):
    rates = {"wer": 0.5, "left_out": 1.0}
    monkeypatch.setattr(validation_module, "error_rates", lambda *_: (rates, "", [BAD]))
    run.evaluation.validation.evaluate(BRANCH, 0, steps=7)
    (row,) = (run.recipe.folder / validation_module.BAD_SAMPLES).read_text().splitlines()
    row = json.loads(row)
    assert (row["cause"], row["shard"], row["key"]) == BAD[:3] and row["steps"] == 7
    assert "left out: 1 (decode_error 1); the first: k in s.tar: torn" in capsys.readouterr().out
    assert run.evaluation.validation.score(7) == 0.5
    monkeypatch.setattr(validation_module, "error_rates", lambda *_: ({"wer": math.nan}, "", []))
    run.evaluation.validation.evaluate(BRANCH, 0, steps=8)
    assert run.evaluation.validation.score(8) is None and run.evaluation.validation.best == 0.5


def test_an_evaluation_says_what_the_model_has_not_learned(run, monkeypatch, capsys):
    sft = SimpleNamespace(name="sft", stage=SimpleNamespace(name="align"))
    for branch, rates, words in (
        (sft, {"loss": 2.0, "audio_gain": 0.001}, "align hardly depends on the audio: NLL 2.000 a"),
        (sft, {"loss": 2.0, "audio_gain": 0.5}, ""),
        (sft, {"loss": 2.0}, ""),
        (BRANCH, {"phoneme_error_rate": 0.97}, "CTC of pretrain is on its plateau"),
        (BRANCH, {"phoneme_error_rate": 0.6}, ""),
    ):
        monkeypatch.setattr(validation_module, "error_rates", lambda *_, r=rates: (r, [], []))
        run.evaluation.validation.evaluate(branch, 0, steps=7)
        lines = [x for x in capsys.readouterr().out.splitlines() if "WARNING" in x]
        assert len(lines) == bool(words) and words in "".join(lines)
    kinds = [e["event"] for e in read_events(run.recipe.folder)]
    assert kinds.count("audio_ignored") == kinds.count("ctc_plateau") == 1


def test_a_validation_set_without_a_usable_sample(run, monkeypatch):
    empty = Batch.blank(torch.zeros(0, 0, 80), bad=(BAD,))
    monkeypatch.setattr(type(run.builder), "validation_batches", lambda *_: [empty])
    run.evaluation.validation.evaluate(BRANCH, 0, steps=3)
    (event,) = [e for e in read_events(run.recipe.folder) if e["event"] == "evaluation_failed"]
    assert "the validation set has no usable sample: all 1 were dropped" in event["reason"]


def test_the_last_step_is_saved_before_the_last_evaluation(run, monkeypatch):
    done = []
    run.branches = [SimpleNamespace(name="pretrain", stage=BRANCH.stage)]
    monkeypatch.setattr(run.evaluation, "validate", lambda *_: done.append("evaluate"))
    monkeypatch.setattr(run, "save", lambda: done.append(f"finished={run._finished}") or True)
    monkeypatch.setattr(run, "_plot", lambda: None)
    run.finish()
    assert done == ["finished=False", "evaluate", "finished=True"]


class Killed(BaseException):
    """As the kernel ends a process: nothing in it goes on."""


def killing(*_: object) -> None:
    raise Killed


def without_engines(trainer: Trainer) -> Trainer:
    """``trainer`` with branches that have no engine: here is no process group for one."""
    branch = SimpleNamespace(name="pretrain", stage=trainer.recipe.stages[0])
    trainer.branches = SimpleNamespace(
        fragments=lambda: {"w": Fragment((1,), 0, torch.ones(1))},
        state=dict,
        get_if_built={"pretrain": branch}.get,
        enter=lambda *_: branch,
    )
    return trainer


def after(trainer: Trainer, steps: int) -> None:
    """What follows pretrain step ``steps``, counted from 1."""
    trainer.progress = replace(trainer.progress, pretrain=steps)
    trainer.evaluate_if_due(trainer.branches.get_if_built("pretrain"), report(steps - 1))
    trainer.save_if_due()


def test_a_run_is_saved_before_a_periodic_evaluation_and_repeats_it(
    trainer_of, tmp_path, monkeypatch, capsys
):
    overrides = ["evaluation.every=2", "checkpoint.every_steps=40"]
    first = without_engines(trainer_of(tmp_path / "run", *overrides))
    after(first, 3)  # no evaluation
    assert not first.checkpoints.list()
    monkeypatch.setattr(validation_module, "error_rates", killing)
    with pytest.raises(Killed):
        after(first, 4)
    assert [path.name for path in first.checkpoints.list()] == ["step-0000000004"]
    first.close()

    left_out = without_engines(trainer_of(tmp_path / "run", "evaluation.every=0"))
    left_out.finish_evaluation()
    assert read_events(left_out.recipe.folder)[-1]["event"] == "resumed"
    left_out.close()

    again = without_engines(trainer_of(tmp_path / "run", *overrides))
    monkeypatch.setattr(validation_module, "error_rates", lambda *_: ({"wer": 0.5}, "", []))
    again.finish_evaluation()
    again.finish_evaluation()  # once
    kinds = [(e["event"], e["steps"]) for e in read_events(again.recipe.folder)]
    assert kinds[-3:] == [("resumed", 4), ("evaluation_repeated", 4), ("evaluated", 4)]
    assert "evaluation.every=0" in capsys.readouterr().out
    # A tenth of an interval bounds what is lost: less is not worth a checkpoint.
    for steps in range(5, 10):
        after(again, steps)
    assert [path.name[-1] for path in again.checkpoints.list()] == ["4", "6"]
    again.progress = replace(again.progress, pretrain=9)
    again.save()
    again.close()
    assert trainer_of(tmp_path / "run", *overrides).evaluation.running is None


def test_a_checkpoint_of_before_the_evaluation_is_not_written_twice(run, monkeypatch):
    saved = []
    monkeypatch.setattr(run, "save", lambda wait=True: saved.append(wait) or True)
    monkeypatch.setattr(run.checkpoints, "due", lambda _: True)
    run.save_if_due()
    run._saved_early = run.steps
    run.save_if_due()
    assert saved == [False]


def test_a_probe_evaluation_that_fails_ends_no_run(trainer_of, tmp_path, monkeypatch):
    run = without_engines(trainer_of(tmp_path / "run", "probe.every=1"))
    monkeypatch.setattr(run.evaluation.online_probe, "evaluate", failing)
    after(run, 1)
    (event,) = [e for e in read_events(run.recipe.folder) if e["event"] == "evaluation_failed"]
    assert "CUDA out of memory" in event["reason"]
