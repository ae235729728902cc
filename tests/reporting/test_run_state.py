"""What a run folder tells: states, stages, times left; and what it must not break on."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, replace

import pytest

from dsasr.launch import run_lock, slurm
from dsasr.launch.run_lock import Owner
from dsasr.reporting.run_state import Job, State, job_folders


def lock(folder, beat="7", **changes) -> Owner:
    owner = replace(Owner.this_process(), **changes)
    (folder / run_lock.LOCK).write_text(json.dumps(asdict(owner)))
    run_lock.beat_path(folder, owner).write_text(beat)
    return owner


@pytest.mark.parametrize(
    ("ends", "state"),
    [("finished", State("finished")), ("stopped", State("stopped", "by SIGTERM")),
     ("", State("failed", "ended before its schedule did"))],
)  # fmt: skip
def test_a_run_that_has_ended(logged_run, ends, state):
    folder = logged_run(ends=ends)
    assert Job(folder, folder).state == state


def test_a_run_of_this_machine_trains_as_long_as_its_process_lives(logged_run):
    folder = logged_run()
    owner = lock(folder)
    assert Job(folder, folder).state.name == "running"
    lock(folder, beat="stopping 8")
    assert Job(folder, folder).state.name == "stopping"
    lock(folder, pid_started="1", pid=owner.pid)  # a later process has its id
    state = Job(folder, folder).state
    assert state.name == "failed" and state.detail.startswith("killed on ")


def test_a_run_elsewhere_trains_as_long_as_its_beat_changes(logged_run, monkeypatch):
    folder = logged_run()
    owner = lock(folder, machine="another", host="n7", job="12")
    job = Job(folder, folder)
    assert job.state == State("running", f"on n7, process {owner.pid}, Slurm job 12")
    beat = run_lock.beat_path(folder, owner)
    old = beat.stat().st_mtime - 600
    os.utime(beat, (old, old))
    assert Job(folder, folder).state.name == "failed"  # by the file's date
    assert "silent for 1" in Job(folder, folder).state.detail
    monkeypatch.setattr(run_lock, "STALE", 0.0)
    job.refresh()
    assert job.state.name == "failed"  # one that was watched, without a look at any date
    beat.write_text("8")
    monkeypatch.setattr(run_lock, "STALE", 120.0)
    job.refresh()
    assert job.state.name == "running"


def test_a_job_between_two_starts_waits(logged_run):
    folder = logged_run(ends="stopped")
    (folder / slurm.JOB_LOCK).write_text("34 n1 now\n")
    assert Job(folder, folder).state == State("waiting", "for Slurm job 34")


def test_stages_and_times_left(logged_run):
    folder = logged_run(steps=30)
    job = Job(folder, folder)
    assert [(s.name, s.done, s.steps) for s in job.stages] == [("ctc", 30, 40), ("align", 0, 10)]
    assert job.steps == (30, 50) and [s.name for s in job.current] == ["ctc"]
    assert job.seconds_left == pytest.approx(6.0 * 20)
    assert job.stage_seconds_left(job.stages[0]) == pytest.approx(60.0)
    assert job.stage_seconds_left(job.stages[1]) is None  # no step of it was timed


def test_a_concurrent_run_has_two_jobs(logged_run):
    folder = logged_run("run/pretrain", branch="pretrain").parent
    logged_run("run/sft", branch="sft", steps=10)
    assert [f.name for f in job_folders(folder)] == ["pretrain", "sft"]
    jobs = [Job(f, folder) for f in job_folders(folder)]
    assert [j.name for j in jobs] == ["run/pretrain", "run/sft"]
    assert [[s.name for s in j.stages] for j in jobs] == [["ctc"], ["align"]]


def test_nothing_is_written(logged_run):
    folder = logged_run()
    lock(folder, machine="another")
    before = {p: p.stat().st_mtime_ns for p in [folder, *folder.iterdir()]}
    Job(folder, folder).refresh()
    assert {p: p.stat().st_mtime_ns for p in [folder, *folder.iterdir()]} == before


def test_a_run_that_vanishes_and_comes_back(logged_run, tmp_path):
    folder = logged_run()
    job = Job(folder, folder)
    shutil.move(folder, tmp_path / "away")
    job.refresh()
    assert job.gone and "is gone" in job.problems[0] and job.steps == (30, 50)
    shutil.move(tmp_path / "away", folder)
    job.refresh()
    assert not job.gone and job.problems == []


@pytest.mark.parametrize(
    "line",
    ['{"steps": "many", "stage": {}, "step": null}', '{"step": NaN, "stage": "ctc"}',
     '{"step": 1e999, "stage": "ctc", "steps": 3}', "[]", '{"step": true}', "{}", "\\x00",
     '{"stage": "ctc", "step": 1%s}' % ("0" * 400)],
)  # fmt: skip
def test_odd_lines_of_metrics_are_passed_over(logged_run, line):
    folder = logged_run()
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(line + "\n" + '{"step": 4')
    job = Job(folder, folder)
    assert job.steps == (30, 50) and job.seconds_left == pytest.approx(120.0)


@pytest.mark.parametrize("recipe", ["stages: [", "[1, 2]", "stages: 3", "stages: [{name: x}]", ""])
def test_a_damaged_recipe_leaves_the_rest(logged_run, recipe):
    folder = logged_run(ends="finished")
    (folder / "recipe.yaml").write_text(recipe)
    job = Job(folder, folder)
    assert job.stages == [] and job.state.name == "finished" and job.seconds == 180.0
    assert bool(job.problems) == (recipe == "stages: [")


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"token": "x"}', "\x00"])
def test_a_torn_lock_is_no_sign_of_life(logged_run, text):
    folder = logged_run(ends="finished")
    (folder / run_lock.LOCK).write_text(text)
    assert Job(folder, folder).state.name == "finished"


def test_a_lock_with_odd_values_is_named(logged_run):
    folder = logged_run()
    owner = replace(Owner.this_process(), token="a\x00b", machine="another", host="n7")
    (folder / run_lock.LOCK).write_text(json.dumps(asdict(owner)))
    assert Job(folder, folder).state.name in ("running", "failed")
