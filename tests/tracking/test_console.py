"""The exact lines that a run prints."""

from __future__ import annotations

import pytest

from dsasr.tracking import console
from dsasr.tracking.console import clock, duration, event_line, number, percent, progress_line
from dsasr.utils.troubleshooting import see


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (65, "1:05"), (3725.9, "1:02:05"), (-3, "0:00")]
)
def test_clock(seconds, text):
    assert clock(seconds) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.034, "0.03 s"), (4.24, "4.2 s"), (12.4, "12 s"), (59.9, "60 s"), (3725.9, "1:02:05")],
)
def test_duration(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(1234, "1,234"), (3573.9821999999986, "3574"), (14400.0, "14,400"), (0.975, "0.975"),
     (1.5e-7, "1.5e-07"), (float("nan"), "nan"), (None, "None"), ("final", "final"),
     (True, "True")],
)  # fmt: skip
def test_number(value, text):
    assert number(value) == text


def test_percent():
    assert percent(0.12345) == "12.3%"


def test_the_line_of_a_log_interval():
    line = {"nll": 2.13449, "entropy": 2.3, "accuracy": 0.4119, "audio_hours_per_hour": 1312.4}
    line |= {"lr_adaptor": 1e-3, "lr_llm": 1e-3, "grad_norm": 0.5, "wait_share": 0.1}
    assert progress_line(120, 14_400, "ia_sft", 40, line, 3725.9) == (
        "[   120/14,400] ia_sft          40  NLL 2.134  entropy 2.300  accuracy 41.2%  lr 1.0e-03"
        "  1,312 audio h/h  ETA 1:02:05"
    )
    line = {"ctc": 12345.6, "consistency": 0.01, "audio_hours_per_hour": 9.6}
    line |= {"lr_encoder": 1e-5, "lr_ctc": 5e-4}
    assert progress_line(14_400, 14_400, "pretrain", 9_000, line, 0.0) == (
        "[14,400/14,400] pretrain     9,000  CTC 1.23e+04  consistency 0.010  lr 1.0e-05…5.0e-04"
        "  10 audio h/h  ETA 0:00"
    )


@pytest.mark.parametrize(
    ("kind", "fields", "text"),
    [
        ("stage", {"name": "align", "branch": "sft", "switch_seconds": 0.312},
         "— stage align starts (sft branch, ready in 0.31 s)"),
        ("stage_end", {"name": "align", "stage_seconds": 723.2},
         "— stage align ends after 12:03 of training"),
        ("initialized", {"key": "init_from", "source": "models/mine", "left": {},
                         "taken": {"encoder": (36, 5756), "llm": (13, 1_720_000_000)},
                         "fresh": {"lora": [14, 4096]}},
         "— initial weights from models/mine (model.init_from): taken: encoder 36 tensors (5,756 "
         "parameters), llm 13 tensors (1,720,000,000 parameters); left: nothing; fresh: lora 14 "
         "tensors (4,096 parameters)"),
        ("partly_initialized", {"part": "encoder", "source": "models/mine", "fresh": 12,
                                "tensors": 1048},
         "WARNING only a part of the encoder is from models/mine: 12 of its 1,048 tensors are "
         "fresh"),
        ("resumed", {"checkpoint": "step-0000000007"},
         "— resumed from checkpoint step-0000000007"),
        ("checkpoint", {"name": "step-0000000007", "save_seconds": 1.21, "stall_seconds": 0.034},
         "— checkpoint step-0000000007 saved in 1.2 s (training waited 0.03 s)"),
        ("checkpoint_failed", {"reason": "No space left on device"},
         f"WARNING checkpoint not saved: No space left on device{see('disk')}"),
        ("checkpoint_passed_over", {"reason": "step-0000000007: torn"},
         "WARNING checkpoint not resumed from: step-0000000007: torn"),
        ("reference", {"pretrain": 1500}, "— drift reference taken at pretrain step 1,500"),
        ("drift", {"cka": 0.97312, "threshold": 0.975, "pretrain": 1510, "share_of_time": 0.0041},
         "— drift at pretrain step 1,510: CKA 0.9731 < threshold 0.975 (measuring takes 0.4% of "
         "the time)"),
        ("drift", {"cka": 0.98, "threshold": 0.975, "pretrain": 8, "share_of_time": 0.0},
         "— drift at pretrain step 8: CKA 0.9800 ≥ threshold 0.975 (measuring takes 0.0% of the "
         "time)"),
        ("drift", {"cka": float("nan"), "threshold": 0.975, "pretrain": 8, "share_of_time": 0.0},
         "— drift at pretrain step 8: CKA nan against threshold 0.975 (measuring takes 0.0% of "
         "the time)"),
        ("published", {"snapshot": "encoder-000001510", "cause": "drift", "pretrain": 1510,
                       "publish_seconds": 0.81, "cka": 0.97312},
         "— published encoder-000001510 (drift, CKA 0.9731) in 0.81 s"),
        ("published", {"snapshot": "encoder-000001510", "cause": "final", "pretrain": 1510,
                       "publish_seconds": 0.81},
         "— published encoder-000001510 (final) in 0.81 s"),
        ("swap", {"snapshot": "encoder-000001510", "cause": "drift", "stage": "ia_sft",
                  "pretrain": 1510, "sft": 1040, "swap_seconds": 0.05, "checksum": "3f",
                  "nll_before": None},
         "— swapped to encoder-000001510 (drift) at sft step 1,040 in 0.05 s"),
        ("after_swap", {"nll_before": 2.1345, "nll": 2.1, "sft_steps": 3},
         "— NLL 2.135 → 2.100 by the swap (sft steps since: 3)"),
        ("after_swap", {"nll_before": None, "nll": 2.1, "sft_steps": 3},
         "— NLL 2.100 with its first encoder (sft steps since: 3)"),
        ("refused", {"reason": "a weight is not finite", "snapshot": "encoder-000000009",
                     "sft": 4},
         f"WARNING encoder-000000009 refused: a weight is not finite{see('encoder-refused')}"),
        ("refused", {"reason": "CKA is not a number", "pretrain": 6},
         "WARNING encoder of pretrain step 6 refused: CKA is not a number"
         f"{see('encoder-refused')}"),
        ("waiting", {"sft": 0, "late": "wait"},
         "— waiting for the next encoder at sft step 0 (store.late=wait)"),
        ("publisher_lost", {"silent_seconds": 905.2, "last": "encoder-000000009"},
         "WARNING publisher silent for 15:05: encoder-000000009 is used as the final encoder"),
        ("not_marked", {"snapshot": "encoder-000000009", "reason": "No space left on device"},
         "WARNING encoder-000000009 not marked as in use: No space left on device"),
        ("bad_samples", {"empty_text": 3, "too_long": 1209},
         "WARNING bad samples so far: 1,212 (empty_text 3, too_long 1,209)"),
        ("stopped", {"cause": "SIGTERM"}, "— stopped by SIGTERM"),
        ("finished", {}, "— finished"),
        ("was_finished", {}, "— this run was finished already: give another run=FOLDER, or go on "
         "with more steps of its last stage, stages.NAME.steps=N allow_changed=true"),
        ("swap", {"snapshot": "given", "cause": "given", "sft": 0, "swap_seconds": 0.1},
         "— the sft branch starts with the encoder that the run was given"),
        ("some_other", {"seconds": 3573.9821999999986, "name": "x"},
         "— some_other  seconds 3574  name x"),
    ],
)  # fmt: skip
def test_the_line_of_an_event(kind, fields, text):
    assert event_line(42, 14_400, kind, {**fields, "steps": 42}) == f"[    42/14,400] {text}"


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"wer": 0.1234, "cer": 0.05, "wer/en": 0.1234, "cer/zh": 0.0449, "substitutions": 0.1,
          "utterances": 400.0, "hallucination/flagged": 0.012, "hallucination/loop": 0.01,
          "hallucination/snr0/flagged": 0.5},
         "WER en 12.3%  CER zh 4.5%  hallucination 1.2%"),
        ({"wer": 0.1234, "character_rate": 0.03, "left_out": 2.0},
         "WER 12.3%  (2 bad samples left out)"),
        ({"phoneme_error_rate": 1.204}, "PER 120.4%"),
        ({"utterances": 0.0}, "no reference text"),
    ],
)  # fmt: skip
def test_an_evaluation_prints_error_rates_by_language_and_hallucinations(values, text):
    line = event_line(42, 42, "evaluated", {"stage": "joint", "steps": 42, **values})
    assert line == f"[42/42] — evaluated joint: {text}"


def test_a_warning_outside_the_event_log():
    assert console.warning_line("metrics cannot be written") == "WARNING metrics cannot be written"
