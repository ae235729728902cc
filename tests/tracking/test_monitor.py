from __future__ import annotations

import json
import math

import pytest
import torch

from dsasr.data.batch import Batch
from dsasr.engine.step_report import StepReport
from dsasr.tracking.monitor import Monitor, MonitorConfig, clock


def batch(rows: int = 2, frames: int = 10, bad=()) -> Batch:
    features = torch.zeros(rows, frames, 4)
    lengths = torch.tensor([frames] + [frames // 2] * (rows - 1))
    none, ones = torch.zeros(rows, 0, dtype=torch.int64), torch.ones(rows, dtype=torch.int64)
    texts = ("",) * rows
    return Batch(
        *(features, lengths, none, ones, none, ones),
        *(texts, texts, texts, texts, texts, (1.5,) * rows, 0, 0, 0, {}),
        bad=tuple(bad),
        stats={"bytes": 500.0, "queue": 2, "decode_s": 0.003, "feature_s": 0.006, "read_s": 0.0},
    )


def report(step: int, total: float, count: float = 2.0, branch="sft") -> StepReport:
    sums = {"nll": (torch.tensor(total), torch.tensor(count))}
    return StepReport(branch, branch, step, sums, {"llm": 1e-3}, 0.5, (batch(bad=["x"]),))


def lines(folder, name="metrics"):
    return [json.loads(x) for x in (folder / f"{name}.jsonl").read_text().splitlines()]


def plain(line):
    return {k: line[k] for k in ("steps", "step", "nll", "bad_samples", "padding_share")}


def test_a_line_is_the_mean_since_the_last_one(tmp_path, capsys):
    monitor = Monitor(tmp_path, MonitorConfig(every=3, tensorboard=False), 10)
    for step, total in enumerate([1.0, 2.0, 6.0, 7.0]):
        monitor.step(
            report(step, total), step + 1, 0.0, last=step == 3, more={"offloaded_bytes": 9.0}
        )
    monitor.close()
    first, second = lines(tmp_path)
    assert first["nll"] == 9 / 6 and second["nll"] == 7 / 2
    assert first["bad_samples"] == 3 and first["offloaded_bytes"] == 9 and first["lr_llm"] == 1e-3
    assert first["padding_share"] == pytest.approx(0.25) and second["step"] == 4
    assert first["audio_hours_per_hour"] > 0
    # Three batches of 3 s of audio each.
    assert first["decode_ms_per_s"] == pytest.approx(1) and first["queue_depth"] == 2
    assert first["feature_ms_per_s"] == pytest.approx(2) and first["read_ms_per_s"] == 0
    assert first["bytes_per_second"] > 0 and 0 <= first["wait_share"] <= 1
    assert "[3/10] sft 3  nll 1.500" in capsys.readouterr().out


def test_counting_goes_on_over_a_checkpoint(tmp_path):
    totals = [0.1, 0.2, 0.3, 0.4, 0.5, 0.7]

    def run(folder, cut):
        monitor = Monitor(folder, MonitorConfig(every=6, tensorboard=False), 10)
        for step, total in enumerate(totals):
            if step == cut:
                state = json.loads(json.dumps(monitor.state()))
                monitor.step(report(step, 99.0), step + 1, 0.0)  # made, but lost with the kill
                monitor.close()
                monitor = Monitor(folder, MonitorConfig(every=6, tensorboard=False), 10, step)
                monitor.load(state)
            monitor.step(report(step, total), step + 1, 0.0)
        monitor.close()
        return [plain(x) for x in lines(folder)]

    assert run(tmp_path / "cut", 4) == run(tmp_path / "whole", None)


def test_lines_beyond_the_checkpoint_and_torn_ones_go(tmp_path):
    rows = [json.dumps({"steps": s}) + "\n" for s in (3, 6, 9)]
    (tmp_path / "metrics.jsonl").write_text("".join(rows) + '{"steps": 1')
    (tmp_path / "events.jsonl").write_text("".join(rows))
    Monitor(tmp_path, MonitorConfig(tensorboard=False), 10, 6).close()
    assert [x["steps"] for x in lines(tmp_path)] == [3, 6]
    assert [x["steps"] for x in lines(tmp_path, "events")] == [3, 6]


def test_what_came_after_the_checkpoint_and_before_the_next_step_goes(tmp_path):
    """A swap, say, which the resumed run makes again; what tells of the job stays."""
    config = MonitorConfig(tensorboard=False)
    monitor = Monitor(tmp_path, config, 10)
    monitor.event("published", steps=6)
    monitor.scalars({"steps": 6}, {"cka": 0.5})
    written = monitor.state()["written"]
    monitor.event("checkpoint", steps=6)
    monitor.event("swap", steps=6)
    monitor.scalars({"steps": 6}, {"in_use": 6.0})
    monitor.close()
    for _ in range(2):  # killed twice at the same place
        monitor = Monitor(tmp_path, config, 10, 6, written)
        monitor.event("resumed", steps=6)
        monitor.event("swap", steps=6)
        monitor.scalars({"steps": 6}, {"in_use": 6.0})
        monitor.close()
    told = [x["event"] for x in lines(tmp_path, "events")]
    assert told == ["published", "checkpoint", "resumed", "resumed", "swap"]
    assert [x.get("in_use") for x in lines(tmp_path)] == [None, 6.0]


def test_tensorboard_holds_cka_threshold_swaps_and_parked_bytes(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monitor = Monitor(tmp_path, MonitorConfig(every=1), 10)
    monitor.step(report(0, 1.0), 1, 0.0, more={"offloaded_bytes": 7.0, "encoder_in_use": 5.0})
    head = {"steps": 1, "branch": "pretrain", "stage": "drift"}
    monitor.scalars(head, {"cka": 0.97, "cka_threshold": 0.975, "drift_share": 0.01})
    monitor.scalars(head | {"stage": "encoder"}, {"swap_seconds": 0.1, "in_use": 5})
    monitor.text("encoder", "encoder-000000005 (drift)", 1)
    monitor.close()
    held = EventAccumulator(str(tmp_path / "tensorboard"))
    held.Reload()
    wanted = {"drift/cka", "drift/cka_threshold", "drift/drift_share", "encoder/swap_seconds"}
    wanted |= {"sft/wait_share", "sft/decode_ms_per_s", "sft/feature_ms_per_s"}
    wanted |= {"sft/padding_share", "sft/queue_depth", "sft/bytes_per_second"}
    wanted |= {"encoder/in_use", "sft/offloaded_bytes", "sft/encoder_in_use", "sft/nll"}
    assert wanted <= set(held.Tags()["scalars"])
    assert any("encoder" in tag for tag in held.Tags()["tensors"])


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0, "0:00"), (65, "1:05"), (3725.9, "1:02:05"), (-3, "0:00")]
)
def test_clock(seconds, shown):
    assert clock(seconds) == shown


def test_a_full_disk_loses_lines_not_the_run(tmp_path, capsys):
    monitor = Monitor(tmp_path, MonitorConfig(tensorboard=False), 10)
    whole = list(monitor._files.values())
    full = open("/dev/full", "w", encoding="utf-8")  # noqa: SIM115
    monitor._files = dict.fromkeys(monitor._files, full)
    for _ in range(3):
        monitor.event("drift", cka=0.5)
        monitor.scalars({"stage": "s", "steps": 1}, {"x": 1.0})
    assert capsys.readouterr().out.count("cannot be written: [Errno 28]") == 1
    monitor.close()
    for handle in whole:
        handle.close()


def test_the_ledger_keeps_each_steps_samples_and_is_cut_at_a_resume(tmp_path):
    config = MonitorConfig(every=3, tensorboard=False, ledger=True)
    monitor = Monitor(tmp_path, config, 10)
    for step in range(4):
        monitor.step(report(step, 1.0), step + 1, 0.0)
        if step == 1:
            state = monitor.state()
    monitor.close()
    assert [x["step"] for x in lines(tmp_path, "ledger")] == [1, 2, 3, 4]
    monitor = Monitor(tmp_path, config, 10, 2, state["written"])
    monitor.step(report(2, 1.0), 3, 0.0)
    monitor.close()
    held = lines(tmp_path, "ledger")
    assert [x["steps"] for x in held] == [1, 2, 3]
    assert held[-1]["samples"] == [[[0, ["", ""]]]] and held[-1]["stage"] == "sft"
    monitor = Monitor(tmp_path / "without", MonitorConfig(tensorboard=False), 10)
    monitor.step(report(0, 1.0), 1, 0.0)
    monitor.close()
    assert not (tmp_path / "without" / "ledger.jsonl").exists()


def test_a_value_that_is_no_number_is_null(tmp_path):
    monitor = Monitor(tmp_path, MonitorConfig(every=1, tensorboard=False), 10)
    line = monitor.step(report(0, math.nan), 1, 0.0, more={"grad_norm": math.inf})
    monitor.event("drift", cka=math.nan, steps=1)
    monitor.close()
    assert math.isnan(line["nll"])  # who stops the run is told what it is
    assert lines(tmp_path)[0]["nll"] is None and lines(tmp_path)[0]["grad_norm"] is None
    assert lines(tmp_path, "events")[0]["cka"] is None
