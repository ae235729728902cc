from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from dsasr import recipe
from dsasr.planning import timeline
from dsasr.planning.memory import Machine, between_steps, step_memory
from dsasr.planning.model_parts import count_parts
from dsasr.schedule import Schedule
from dsasr.stages import DriftConfig, PlannedSwap, StageConfig, learning_rate
from dsasr.tracking import timeline_plot
from dsasr.tracking.timeline_plot import (
    logged_lr_curves,
    planned_lr_curves,
    plot_run,
    split_after,
    stage_spans,
)

PRETRAIN = StageConfig("pretrain", "pretrain", {"encoder": 5e-4, "ctc": 5e-4}, steps=2000)
ALIGN = StageConfig("align", "sft", {"adaptor": 1e-3}, steps=400)
IA_SFT = StageConfig(
    "ia_sft",
    "sft",
    {"adaptor": 1e-5, "llm": 1e-5},
    steps=1600,
    swaps=True,
    steps_after_final_swap=500,
)
JOINT = StageConfig("joint", "sft", {"encoder": 1e-5, "adaptor": 1e-4, "llm": 1e-5}, steps=100)
ALL = (PRETRAIN, ALIGN, IA_SFT, JOINT)


def named(events, kind):
    return [e for e in events if e["event"] == kind]


def test_the_papers_schedule():
    events, accuracy = timeline.simulate_scaled(Schedule(ALL), (1010, 1320))
    steps = {s.name: (s.start, s.stop) for s in stage_spans(events)}
    assert steps["pretrain"][0] == 0 and steps["align"][0] == 1010
    # From the first trigger on the branches take turns, so align's 400 steps take 799.
    assert steps["align"][1] == 1010 + 799
    assert steps["joint"][1] == sum(s.steps for s in ALL) and accuracy == 1
    assert [e["pretrain"] for e in named(events, "swap")] == [1010, 1320, 2000]
    assert [e["cause"] for e in named(events, "published")] == ["drift", "drift", "final"]


def test_a_long_schedule_is_simulated_at_a_scale():
    long = tuple(
        replace(
            s,
            steps=s.steps * 1000,
            steps_after_final_swap=s.steps_after_final_swap * 1000,
            warmup_steps=10_000,
        )
        for s in ALL
    )
    drift = DriftConfig(mode="fixed", swaps=(PlannedSwap(1_010_000), PlannedSwap(1_320_000, 700)))
    events, _ = timeline.simulate_scaled(Schedule(long, drift), ())
    assert events[-1]["steps"] == pytest.approx(4_100_000, rel=1e-3)
    swaps = [e["pretrain"] for e in named(events, "swap")]
    assert swaps == pytest.approx([1_010_000, 1_320_000, 2_000_000], rel=1e-3)
    # Of swaps that fall on one step at that scale, the last is shown.
    near = DriftConfig(mode="fixed", swaps=(PlannedSwap(1), PlannedSwap(3), PlannedSwap(5)))
    shorter, divisor = timeline.scale_down(Schedule(long, near))
    assert divisor > 5 and shorter.drift.swaps == (PlannedSwap(1),)
    assert f"to within {divisor:,}" in timeline.format_events(events, divisor).splitlines()[0]


def test_the_sft_branch_alone_and_an_initial_encoder():
    events = timeline.simulate(Schedule(ALL, branch="sft"))
    assert [s.name for s in stage_spans(events)] == ["align", "ia_sft", "joint"]
    events = timeline.simulate(Schedule((ALIGN, JOINT)))
    assert [e["cause"] for e in named(events, "swap")] == ["given"]


def test_rates_are_drawn_over_the_run_and_equal_groups_once():
    schedule = Schedule(ALL)
    curves = planned_lr_curves(schedule, timeline.simulate(schedule, (1010,)))
    labels = [label for label, *_ in curves]
    assert labels == [
        "pretrain: encoder, ctc",
        "align: adaptor",
        "ia_sft: adaptor, llm",
        "joint: encoder, llm",
        "joint: adaptor",
    ]
    _, steps, rates = curves[1]
    assert steps[0] == 1010 and rates[0] == 1e-3 and rates == sorted(rates, reverse=True)
    # The pretrain branch has the run's first 1010 steps to itself, and takes turns from there on.
    _, steps, rates = curves[0]
    for run_step, stage_step in ((505, 505), (1010, 1010), (1010 + 980, 1010 + 490)):
        drawn = np.interp(run_step, steps, rates)
        assert drawn == pytest.approx(learning_rate(PRETRAIN, "encoder", stage_step), rel=0.01)


def test_a_runs_rates_are_those_that_it_has_logged():
    head = {"branch": "sft", "stage": "joint"}
    rows = [
        {**head, "steps": 10 * s, "step": s, "lr_llm": 1e-3 / s, "lr_adaptor": 1e-3 / s,
         "lr_encoder": 5e-5 / s}
        for s in (1, 2, 4)
    ]  # fmt: skip
    rows.append({**head, "stage": "valid_joint", "steps": 45, "loss": 1.0})
    assert logged_lr_curves(rows) == [
        ("joint: llm, adaptor", [10, 20, 40], [1e-3, 5e-4, 2.5e-4]),
        ("joint: encoder", [10, 20, 40], [5e-5, 2.5e-5, 1.25e-5]),
    ]


def test_the_table_shows_sizes_rates_and_the_planners_memory(tiny):
    cfg = recipe.load(str(tiny))
    table = timeline.stage_table(cfg, ranks=2)
    assert "1 pretrain: 20 steps of cr_ctc" in table and "the last 3 steps wait" in table
    assert "starts from the final encoder" in table and "not known" not in table
    assert "CKA every 2 steps" in timeline.swap_rule(cfg.schedule())
    for stage in cfg.stages:
        memory = step_memory(cfg, stage, Machine(nodes=1, gpus=2), count_parts(cfg))
        peak, resident = sum(memory.values()), between_steps(memory)
        assert f"{peak:.3g} GB a rank on 2 ranks, {resident:.3g} GB of it also between" in table


def test_drift_steps_of_the_paper():
    assert timeline.paper_drift_steps(Schedule(ALL)) == [1010, 1320]
    assert timeline.paper_drift_steps(Schedule(ALL, DriftConfig(start=0.6))) == [1320]
    assert timeline.paper_drift_steps(Schedule(ALL, DriftConfig(mode="final"))) == []


def test_unknown_sizes_are_reported(tiny):
    table = timeline.stage_table(recipe.load(str(tiny), ["model.llm.path=/nowhere"]))
    assert "sizes of adaptor, llm, and so the memory, not known: model.llm.path not there" in table
    assert "memory   not known\n" in table
    table = timeline.stage_table(recipe.load(str(tiny), ["data.phonemes=/nowhere"]))
    assert "for 256 phonemes, as data.phonemes is not there" in table


def test_a_run_is_drawn_from_its_own_events(tmp_path, monkeypatch):
    events = timeline.simulate(Schedule(ALL), (1010, 1320))
    refused = {"event": "refused", "snapshot": "x", "steps": 1200, "reason": "not finite"}
    events += [
        refused,
        {"event": "refused", "reason": "no steps"},
        {"event": "resumed", "steps": 9},
    ]
    head = {"branch": "pretrain", "stage": "pretrain"}
    metrics = [
        {**head, "steps": s, "step": s, "ctc": 3 - s / 2000, "lr_ctc": 1e-3}
        for s in range(0, 2000, 100)
    ]
    metrics += [{**head, "stage": "drift", "steps": 1020, "cka": 0.97, "cka_threshold": 0.975}]
    metrics += [{**head, "stage": "valid_pretrain", "steps": 1020, "loss": 2.5}]
    for name, rows in (("events", events), ("metrics", metrics)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert plot_run(tmp_path).stat().st_size > 10_000
    # What was measured on held-out data is no training loss.
    held_out = {**head, "steps": 1020, "ctc": 99.0, "stage": "allocation_pretrain"}
    drawn = {}
    monkeypatch.setattr(timeline_plot, "plot", lambda *_, **given: drawn.update(given))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(held_out) + "\n")
    plot_run(tmp_path)
    [(name, points)] = drawn["losses"].items()
    assert len(points) == 20 and max(loss for _, loss in points) == 3
    assert drawn["held_out"] == {name: [(1020, 2.5)]}
    [(label, steps, rates)] = drawn["lrs"]
    assert label == "pretrain: ctc" and len(steps) == 20 and set(rates) == {1e-3}
    monkeypatch.undo()
    for name in ("events", "metrics"):  # a run that was stopped at once
        (tmp_path / f"{name}.jsonl").write_text("")
    assert plot_run(tmp_path).is_file()


def test_cka_is_split_where_the_reference_changes():
    """A point at a publication's step was measured before it; one without points is no piece."""
    points = [(10, 0.98), (20, 0.94), (30, 0.99), (50, 0.97)]
    assert split_after(points, [20, 35, 40, 60]) == [points[:2], points[2:3], points[3:]]
    assert split_after(points, []) == [points]
    assert split_after([], [20]) == []
