from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch

from dsasr.data.batch import Batch
from dsasr.engine.step_report import StepReport
from dsasr.tracking.monitor import Monitor, MonitorConfig
from dsasr.tracking.run_log import EVENTS, LEDGER, METRICS, read_events, read_ledger, read_metrics

# The fields that the trainer gives events of these kinds.
PUBLISHED = {"snapshot": "encoder-6", "cause": "drift", "pretrain": 6, "publish_seconds": 0.1}
SWAP = {"snapshot": "encoder-6", "cause": "drift", "sft": 0, "swap_seconds": 0.1}
CHECKPOINT = {"name": "step-6", "save_seconds": 0.5, "stall_seconds": 0.1}
DRIFT = {"threshold": 0.975, "pretrain": 6, "share_of_time": 0.01}


def batch(rows: int = 2, frames: int = 10, bad=()) -> Batch:
    features = torch.zeros(rows, frames, 4)
    lengths = torch.tensor([frames] + [frames // 2] * (rows - 1))
    return Batch.blank(
        features,
        feature_lengths_B=lengths,
        durations=(1.5,) * rows,
        bad=tuple(bad),
        stats={"bytes": 500.0, "queue": 2, "decode_s": 0.003, "feature_s": 0.006, "read_s": 0.0},
    )


def report(step: int, total: float, count: float = 2.0, branch="sft") -> StepReport:
    sums = {"nll": (torch.tensor(total), torch.tensor(count))}
    return StepReport(branch, branch, step, sums, {"llm": 1e-3}, 0.5, (batch(bad=["x"]),))


def compared(line):
    return {k: line[k] for k in ("steps", "step", "nll", "bad_samples", "padding_share")}


def test_a_line_is_the_mean_since_the_last_one(tmp_path, capsys):
    monitor = Monitor(tmp_path, MonitorConfig(every=3, tensorboard=False), 10)
    for step, total in enumerate([1.0, 2.0, 6.0, 7.0]):
        monitor.step(
            report(step, total), step + 1, 0.0, last=step == 3, extra={"offloaded_bytes": 9.0}
        )
    monitor.close()
    first, second = read_metrics(tmp_path)
    assert first["nll"] == 9 / 6 and second["nll"] == 7 / 2
    assert first["bad_samples"] == 3 and first["offloaded_bytes"] == 9 and first["lr_llm"] == 1e-3
    assert first["padding_share"] == pytest.approx(0.25) and second["step"] == 4
    assert first["audio_hours_per_hour"] > 0
    # Three batches of 3 s of audio each.
    assert first["decode_ms_per_s"] == pytest.approx(1) and first["queue_depth"] == 2
    assert first["feature_ms_per_s"] == pytest.approx(2) and first["read_ms_per_s"] == 0
    assert first["bytes_per_second"] > 0 and 0 <= first["wait_share"] <= 1
    assert "[ 3/10] sft              3  NLL 1.500" in capsys.readouterr().out


def test_the_rates_of_the_first_line_are_of_its_whole_step(tmp_path):
    monitor = Monitor(tmp_path, MonitorConfig(every=1, tensorboard=False), 10)
    line = monitor.step(report(0, 1.0), 1, wait=1.0, seconds=4.0)
    assert line["step_seconds"] == pytest.approx(4, abs=0.1)
    assert line["wait_share"] == pytest.approx(0.25, abs=0.01)
    assert line["audio_hours_per_hour"] == pytest.approx(3 / 4, rel=0.03)
    assert monitor.step(report(1, 1.0), 2, wait=0.0, seconds=4.0)["step_seconds"] < 1  # as timed
    monitor.close()


def test_sums_continue_over_a_checkpoint(tmp_path):
    totals = [0.1, 0.2, 0.3, 0.4, 0.5, 0.7]

    def run(folder, cut):
        monitor = Monitor(folder, MonitorConfig(every=6, tensorboard=False), 10)
        for step, total in enumerate(totals):
            if step == cut:
                state = json.loads(json.dumps(monitor.state()))
                monitor.step(report(step, 99.0), step + 1, 0.0)  # lost with the kill
                monitor.close()
                monitor = Monitor(folder, MonitorConfig(every=6, tensorboard=False), 10, step)
                monitor.load(state)
            monitor.step(report(step, total), step + 1, 0.0)
        monitor.close()
        return [compared(x) for x in read_metrics(folder)]

    assert run(tmp_path / "cut", 4) == run(tmp_path / "whole", None)


def test_lines_after_the_checkpoint_and_torn_ones_are_removed(tmp_path):
    rows = [json.dumps({"steps": s}) + "\n" for s in (3, 6, 9)]
    (tmp_path / METRICS).write_text("".join(rows) + '{"steps": 1')
    (tmp_path / EVENTS).write_text("".join(rows))
    Monitor(tmp_path, MonitorConfig(tensorboard=False), 10, 6).close()
    assert [x["steps"] for x in read_metrics(tmp_path)] == [3, 6]
    assert [x["steps"] for x in read_events(tmp_path)] == [3, 6]


def test_lines_between_the_checkpoint_and_the_next_step_are_removed(tmp_path):
    """Such as a swap, which the resumed run repeats; events of the job stay."""
    config = MonitorConfig(tensorboard=False)
    monitor = Monitor(tmp_path, config, 10)
    monitor.event("published", **PUBLISHED, steps=6)
    monitor.scalars({"steps": 6}, {"cka": 0.5})
    written = monitor.state()["written"]
    monitor.event("checkpoint", **CHECKPOINT, steps=6)
    monitor.event("swap", **SWAP, steps=6)
    monitor.scalars({"steps": 6}, {"in_use": 6.0})
    monitor.close()
    for _ in range(2):  # killed twice at the same place
        monitor = Monitor(tmp_path, config, 10, 6, written)
        monitor.event("resumed", checkpoint="step-6", steps=6)
        monitor.event("swap", **SWAP, steps=6)
        monitor.scalars({"steps": 6}, {"in_use": 6.0})
        monitor.close()
    kinds = [x["event"] for x in read_events(tmp_path)]
    assert kinds == ["published", "checkpoint", "resumed", "resumed", "swap"]
    assert [x.get("in_use") for x in read_metrics(tmp_path)] == [None, 6.0]


def test_lines_events_texts_and_gradients_reach_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monitor = Monitor(tmp_path, MonitorConfig(every=2), 10, stages={"sft": "sft"})
    histogram = replace(report(0, 1.0), gradients={"llm": [0, 3] + 58 * [0]})
    monitor.step(histogram, 1, 0.0)  # no line is due
    extra = {"offloaded_bytes": 7.0, "encoder_in_use": 5.0}
    line = monitor.step(report(1, 1.0), 2, 0.0, extra=extra)
    head = {"steps": 2, "branch": "pretrain", "stage": "drift"}
    monitor.scalars(head, {"cka": 0.97, "cka_threshold": 0.975, "drift_share": 0.01})
    monitor.event("swap", **SWAP, steps=2)
    monitor.text("sft", "valid/transcripts", "ref", 2)
    monitor.close()
    folder = tmp_path / "tensorboard"
    boards = {p.name: EventAccumulator(str(p)).Reload() for p in sorted(folder.iterdir())}
    assert set(boards) == {"pretrain", "sft"}
    assert {t for t in boards["pretrain"].Tags()["scalars"]} == {
        "drift/cka", "drift/cka_threshold", "drift/drift_share",
    }  # fmt: skip
    tags = boards["sft"].Tags()
    expected = {"train/loss", "train/lr/llm", "train/grad_norm", "train/stage"}
    expected |= {"memory/offloaded_bytes", "memory/memory_bytes", "swap/encoder_in_use"}
    expected |= {"data/wait_share", "data/feature_ms_per_s", "speed/audio_hours_per_hour"}
    assert expected <= set(tags["scalars"]) and tags["histograms"] == ["gradient/log10_llm"]
    assert {"events/text_summary", "valid/transcripts/text_summary"} <= set(tags["tensors"])
    assert line["memory_bytes"] > 1e7  # this process has torch in memory


def test_a_full_disk_loses_lines_not_the_run(tmp_path, capsys):
    monitor = Monitor(tmp_path, MonitorConfig(tensorboard=False), 10)
    files = list(monitor._files.values())
    full = open("/dev/full", "w", encoding="utf-8")  # noqa: SIM115
    monitor._files = dict.fromkeys(monitor._files, full)
    for _ in range(3):
        monitor.event("drift", **DRIFT, cka=0.5)
        monitor.scalars({"stage": "s", "steps": 1}, {"x": 1.0})
    assert capsys.readouterr().out.count("cannot be written: [Errno 28]") == 1
    monitor.close()
    for handle in files:
        handle.close()


def test_the_ledger_has_each_steps_samples_and_is_truncated_at_a_resume(tmp_path):
    config = MonitorConfig(every=3, tensorboard=False, ledger=True)
    monitor = Monitor(tmp_path, config, 10)
    for step in range(4):
        monitor.step(report(step, 1.0), step + 1, 0.0)
        if step == 1:
            state = monitor.state()
    monitor.close()
    assert [x["step"] for x in read_ledger(tmp_path)] == [1, 2, 3, 4]
    monitor = Monitor(tmp_path, config, 10, 2, state["written"])
    monitor.step(report(2, 1.0), 3, 0.0)
    monitor.close()
    ledger = read_ledger(tmp_path)
    assert [x["steps"] for x in ledger] == [1, 2, 3]
    assert ledger[-1]["samples"] == [[[0, ["", ""]]]] and ledger[-1]["stage"] == "sft"
    monitor = Monitor(tmp_path / "without", MonitorConfig(tensorboard=False), 10)
    monitor.step(report(0, 1.0), 1, 0.0)
    monitor.close()
    assert not (tmp_path / "without" / LEDGER).exists()


def test_a_value_that_is_not_finite_is_null(tmp_path):
    monitor = Monitor(tmp_path, MonitorConfig(every=1, tensorboard=False), 10)
    line = monitor.step(report(0, math.nan), 1, 0.0, extra={"grad_norm": math.inf})
    monitor.event("drift", **DRIFT, cka=math.nan, steps=1)
    monitor.close()
    assert math.isnan(line["nll"])  # the trainer stops the run by it
    assert (
        read_metrics(tmp_path)[0]["nll"] is None and read_metrics(tmp_path)[0]["grad_norm"] is None
    )
    assert read_events(tmp_path)[0]["cka"] is None
