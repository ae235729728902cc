from __future__ import annotations

import json

import pytest

from dsasr import recipe
from dsasr.planning import timeline
from dsasr.stages import DriftConfig, PlannedSwap, Schedule, StageConfig
from dsasr.tracking.timeline_plot import lr_curves, plot_run, stage_spans

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


def test_the_papers_course_on_a_clock():
    events = timeline.course(Schedule(ALL), (1010, 1320))
    held = {s.name: (s.start, s.stop) for s in stage_spans(events)}
    assert held["pretrain"][0] == 0 and held["align"][0] == 1010
    # From the first trigger on the branches take turns, so align's 400 steps take 799.
    assert held["align"][1] == 1010 + 799
    assert held["joint"][1] == sum(s.steps for s in ALL)
    assert [e["pretrain"] for e in named(events, "swap")] == [1010, 1320, 2000]
    assert [e["cause"] for e in named(events, "published")] == ["drift", "drift", "final"]


def test_a_long_course_is_walked_in_jumps():
    from dataclasses import replace

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
    events = timeline.course(Schedule(long, drift), ())
    assert events[-1]["steps"] == pytest.approx(4_100_000, rel=1e-3)
    at = [e["pretrain"] for e in named(events, "swap")]
    assert at == pytest.approx([1_010_000, 1_320_000, 2_000_000], rel=1e-3)
    # Swaps nearer to each other than a jump is long are shown as the last of them.
    near = DriftConfig(mode="fixed", swaps=(PlannedSwap(1), PlannedSwap(3), PlannedSwap(5)))
    shorter, by = timeline.shrink(Schedule(long, near))
    assert by > 5 and shorter.drift.swaps == (PlannedSwap(1),)
    assert f"to within {by:,}" in timeline.describe(events, by).splitlines()[0]


def test_the_sft_branch_alone_and_a_given_encoder():
    events = timeline.simulate(Schedule(ALL, branch="sft"))
    assert [s.name for s in stage_spans(events)] == ["align", "ia_sft", "joint"]
    events = timeline.simulate(Schedule((ALIGN, JOINT)))
    assert [e["cause"] for e in named(events, "swap")] == ["given"]


def test_rates_are_drawn_over_the_run_and_equal_groups_once():
    schedule = Schedule(ALL)
    curves = lr_curves(schedule, timeline.course(schedule, (1010,)))
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


def test_memory_by_hand(tiny):
    cfg = recipe.load(str(tiny))
    sizes = timeline.part_sizes(cfg)
    assert set(sizes) == {"encoder", "ctc", "adaptor", "llm"}
    # For the joint stage: bf16 weights of all, 2 + 12 bytes more of what trains.
    joint = cfg.stages[-1]
    every = sizes["encoder"] + sizes["adaptor"] + sizes["llm"]
    assert timeline.memory(cfg, joint, sizes, 2) == 16 * every / 2 / 2**30
    # Beside pretraining the align stage keeps both branches, pretraining's masters among them.
    align = 2 * every + 14 * sizes["adaptor"] + 14 * (sizes["encoder"] + sizes["ctc"])
    assert timeline.memory(cfg, cfg.stages[1], sizes, 1) == align / 2**30


def test_a_run_is_drawn_from_what_it_wrote(tmp_path):
    events = timeline.simulate(Schedule(ALL), (1010, 1320))
    refused = {"event": "refused", "snapshot": "x", "steps": 1200, "reason": "not finite"}
    events += [
        refused,
        {"event": "refused", "reason": "no steps"},
        {"event": "resumed", "steps": 9},
    ]
    metrics = [{"steps": s, "ctc": 3 - s / 2000, "stage": "pretrain"} for s in range(0, 2000, 100)]
    metrics += [{"steps": 1020, "cka": 0.97, "cka_threshold": 0.975}]
    for name, rows in (("events", events), ("metrics", metrics)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert plot_run(tmp_path).stat().st_size > 10_000
    for name in ("events", "metrics"):  # a run that was stopped at once
        (tmp_path / f"{name}.jsonl").write_text("")
    assert plot_run(tmp_path).is_file()
