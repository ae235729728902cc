"""Synthetic runs for the report's tests."""

from __future__ import annotations

import types

import pytest

from dsasr.entropy_allocation.allocation_row import (
    AllocationRow,
    EncoderSource,
    Estimate,
    LlmAllocation,
)
from dsasr.reporting.run_data import RunData
from dsasr.schedule import Schedule
from dsasr.stages import DriftConfig, StageConfig


@pytest.fixture
def made() -> types.SimpleNamespace:
    """The functions below, which make runs and parts of them."""
    return types.SimpleNamespace(
        schedule=schedule, online=online, probes=probes, run=run, rated=rated, suite=suite, row=row
    )


def schedule() -> Schedule:
    both = {"adaptor": 1e-3, "llm": 1e-3}
    return Schedule(
        (
            StageConfig("pretrain", "pretrain", {"encoder": 1e-3, "ctc": 1e-3}, 100),
            StageConfig("align", "sft", {"adaptor": 1e-3}, 10),
            StageConfig("ia_sft", "sft", both, 80, swaps=True, steps_after_final_swap=20),
            StageConfig("joint", "sft", {"encoder": 1e-5, **both}, 20),
        ),
        DriftConfig(start=0.3, interval=0.1, threshold=0.95),
    )


def online(steps, branch, stage, **figures) -> dict:
    """A metrics line of the online probe."""
    row = AllocationRow(
        EncoderSource("x", "live"), nse=0.4 + steps / 1000, effective_rank=9.0, **figures
    )
    head = {"steps": steps, "branch": branch, "stage": f"allocation_{stage}"}
    return head | {"seconds": 2.0 * steps, **row.scalars()}


def probes(pai, csai) -> dict[str, Estimate]:
    values = {"pai": pai, "csai": csai}
    return {name: Estimate(v, v - 0.1, v + 0.1, 4.0, 4.0 - v) for name, v in values.items()}


def run(name="first", **fields) -> RunData:
    events = [
        {"event": "stage", "name": "pretrain", "branch": "pretrain", "steps": 0, "seconds": 0},
        {"event": "drift", "pretrain": 40, "cka": 0.9, "steps": 40, "seconds": 80},
        {"event": "published", "snapshot": "encoder-40", "cause": "drift", "pretrain": 40,
         "cka": 0.9, "steps": 40, "seconds": 80},
        {"event": "stage", "name": "align", "branch": "sft", "steps": 40, "seconds": 80},
        {"event": "swap", "snapshot": "encoder-40", "cause": "drift", "stage": "align",
         "pretrain": 40, "steps": 40, "seconds": 80},
        {"event": "stage_end", "name": "align", "steps": 50, "stage_seconds": 20, "seconds": 100},
        {"event": "stage", "name": "ia_sft", "branch": "sft", "steps": 50, "seconds": 100},
        {"event": "stage_end", "name": "pretrain", "steps": 150, "stage_seconds": 200,
         "seconds": 300},
        {"event": "stage_end", "name": "ia_sft", "steps": 190, "stage_seconds": 160,
         "seconds": 380},
        {"event": "stage", "name": "joint", "branch": "sft", "steps": 190, "seconds": 380},
        {"event": "stage_end", "name": "joint", "steps": 210, "stage_seconds": 40,
         "seconds": 420},
    ]  # fmt: skip
    rates = {"audio_hours_per_hour": 360.0, "step_seconds": 2.0}
    metrics = [
        {"steps": s, "branch": "pretrain", "stage": "pretrain", "step": s, "seconds": 2.0 * s,
         "ctc": 5 - s / 40, **rates}
        for s in (20, 50, 100)
    ]  # fmt: skip
    metrics += [
        {"steps": 40, "branch": "pretrain", "stage": "drift", "seconds": 80.0, "cka": 0.9,
         "cka_threshold": 0.95},
        online(40, "pretrain", "pretrain", **probes(1.0, 0.1)),
        online(150, "pretrain", "pretrain", **probes(2.0, 0.2)),
        online(190, "sft", "ia_sft", llm=LlmAllocation(2.0, 0.4), **probes(2.0, 0.2)),
        online(210, "sft", "joint", llm=LlmAllocation(2.0, 2.3), cka_to_reference=0.98,
               **probes(-0.1, 0.3)),
    ]  # fmt: skip
    metrics += [
        {"steps": s, "branch": "sft", "stage": f"valid_{stage}", "seconds": 2.0 * s, "wer": w,
         "cer": w / 2, "hallucination/flagged": w / 10, "hallucination/characters_per_minute": 60}
        for s, stage, w in ((100, "ia_sft", 0.8), (210, "joint", 0.3))
    ]  # fmt: skip
    return RunData(name, events, metrics, schedule=schedule(), **fields)


def rated(rate):
    counts = {"substitutions": 1, "deletions": 0, "insertions": 0, "units": 10, "utterances": 30}
    return {"rate": rate, "low": rate - 0.02, "high": rate + 0.03, **counts}


def suite() -> dict:
    """A report.json."""
    languages = {"languages": {"en": rated(0.1) | {"unit": "word"}}}
    base = {"lang": "en", "characters": 0, "seconds": 0.0}
    rows = [
        {**base, "condition": "clean", "utterances": 100, "flagged": 1, "clips": 0},
        {**base, "condition": "snr5", "utterances": 100, "flagged": 9, "clips": 0},
        {**base, "condition": "white", "utterances": 0, "flagged": 0, "clips": 4,
         "seconds": 120.0, "characters": 50},
    ]  # fmt: skip
    example = {"kind": "loop", "lang": "en", "condition": "snr5", "key": "k", "detail": "",
               "reference": "a <b> c", "hypothesis": "a a a a a"}  # fmt: skip
    conditions = {"clean": rated(0.1) | languages, "snr5": rated(0.5) | languages}
    return {"conditions": conditions, "hallucination": {"rows": rows, "examples": [example]}}


def row(name, kind, value, settings=None, **source) -> AllocationRow:
    """A row of allocation.jsonl."""
    estimate = Estimate(value, value, value, 2 * value, value)
    run = f"runs/{name.partition('/')[0]}"
    return AllocationRow(
        EncoderSource(name, kind, run=run, **source), nse=0.5, pai=estimate, csai=estimate,
        settings=settings or {},
    )  # fmt: skip
