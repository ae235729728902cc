"""What is read of run folders."""

from __future__ import annotations

import json
import types

import pytest

from dsasr import config, recipe
from dsasr.entropy_allocation.allocation_row import AllocationRow, EncoderSource
from dsasr.reporting import html_report, run_data
from dsasr.utils.errors import UserError


def values(pair) -> tuple[float, ...]:
    return tuple(row.pai.value for row in pair)


def test_before_and_after_joint_prefers_measured_checkpoints(made):
    before, after = run_data.before_and_after(made.run())
    assert before.encoder.stage == "ia_sft" and after.pai.value == -0.1

    measured = made.run(
        jobs=("first",),
        checkpoints=[
            made.row("first/encoder-40", "snapshot", 1.0),
            made.row("first/encoder-100", "snapshot", 2.0),
            made.row("first/step-210", "checkpoint", 3.0, stage="joint", snapshot="encoder-100"),
            made.row("other/encoder-100", "snapshot", 7.0),
            made.row("other/step-210", "checkpoint", 8.0, stage="joint", snapshot="encoder-100"),
            AllocationRow(EncoderSource("whisper", "pretrained", path="whisper"), nse=0.5),
        ],
    )
    assert values(run_data.before_and_after(measured)) == (2.0, 3.0)


def test_rows_of_a_later_stage_are_not_before_joint_training(made):
    data = made.run()
    data.metrics.append(made.online(230, "sft", "context", **made.probes(7.0, 0.7)))
    before, after = run_data.before_and_after(data)
    assert before.encoder.stage == "ia_sft" and after.encoder.stage == "joint"


def test_hours_are_those_of_all_steps_of_each_stage(made):
    data = made.run()
    assert run_data.audio_hours(data) == pytest.approx(360 * 2 * 100 / 3600)
    rates = {"audio_hours_per_hour": 36.0, "step_seconds": 1.0}
    data.metrics.append({"stage": "joint", "branch": "sft", "step": 50, "steps": 200, **rates})
    assert run_data.audio_hours(data) == pytest.approx(20 + 0.5)


def test_before_and_after_of_a_job_on_the_snapshots_of_another(made, tiny, tmp_path):
    rows = {
        "pretrain": [made.row("pretrain/encoder-40", "snapshot", 1.0, {"data": "test"}),
                     made.row("pretrain/encoder-100", "snapshot", 2.0, {"data": "test"}),
                     made.row("pretrain/encoder-100", "snapshot", 9.0, {"data": "other"})],
        "sft": [made.row("sft/step-210", "checkpoint", 3.0, {"data": "test"}, stage="joint",
                    snapshot="encoder-100")],
    }  # fmt: skip
    for branch, of_branch in rows.items():
        folder = tmp_path / "run" / branch
        folder.mkdir(parents=True)
        cfg = recipe.load(str(tiny), [f"run={tmp_path / 'run'}", f"branch={branch}"])
        (folder / "recipe.yaml").write_text(config.dump(cfg))
        logs = {n: [r for r in getattr(made.run(), n) if r.get("branch", branch) == branch]
                for n in ("metrics", "events")}  # fmt: skip
        for name, lines in (*logs.items(), ("allocation", [r.to_json() for r in of_branch])):
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines))
    sft = run_data.collect(tmp_path / "run" / "sft")
    assert values(run_data.before_and_after(sft)) == (2.0, 3.0)
    assert run_data.collect(tmp_path / "run" / "pretrain").publisher_rows == []
    both = run_data.collect(tmp_path / "run")
    assert values(run_data.before_and_after(both)) == (2.0, 3.0)
    assert both.jobs == ("pretrain", "sft") and len(both.checkpoints) == 4
    assert {s.branch for s in both.schedule.stages} == {"pretrain", "sft"}
    page = html_report.write([both], tmp_path / "report").read_text()
    assert "Course of run" in page and "Before and after" in page


def test_an_allocation_file_of_another_version_is_refused(made, tmp_path, monkeypatch):
    for name, lines in (
        ("metrics", made.run().metrics),
        ("allocation", [{"name": "x", "found": True}]),
    ):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines))
    (tmp_path / "recipe.yaml").write_text("seed: 1")
    stub = types.SimpleNamespace(schedule=made.schedule, store_folder=tmp_path / "snapshots")
    monkeypatch.setattr(run_data, "run_recipe", lambda folder: stub)
    with pytest.raises(UserError, match=r"allocation\.jsonl: .*found.*measure again"):
        run_data.collect(tmp_path)


def test_no_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="recipe"):
        run_data.named([tmp_path])
