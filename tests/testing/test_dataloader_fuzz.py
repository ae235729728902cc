"""Random histories of the dataloader, and that the fuzzing detects errors."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dsasr.data.dataloader.sampler import BatchSampler
from dsasr.testing import dataloader_fuzz
from dsasr.testing.dataloader_fuzz import FuzzReport, draw_case, run_case


@pytest.mark.parametrize("seed", range(6))
def test_random_histories_lose_and_repeat_nothing(tmp_path, seed) -> None:
    report = FuzzReport()
    run_case(draw_case(seed), tmp_path / "case", report)
    assert report.clean and report.batches > 0, report


def test_fuzzing_detects_errors(tmp_path, monkeypatch) -> None:
    """A stream that forgets its state, or repeats or changes a batch, does not pass."""
    case = next(c for c in map(draw_case, range(99)) if len(c.segments) > 2 and not c.finite)
    case = replace(
        case, segments=[replace(segment, end="close", workers=0) for segment in case.segments]
    )

    def broken(self, state):
        self.number = int(state["number"])  # but not the parts' cursors

    monkeypatch.setattr(BatchSampler, "load_state", broken)
    report = FuzzReport()
    run_case(case, tmp_path / "one", report)
    assert not report.clean and report.failed
    monkeypatch.undo()
    digest = dataloader_fuzz.digest
    marks = iter(range(10**6))
    monkeypatch.setattr(dataloader_fuzz, "digest", lambda b: digest(b) + str(next(marks)))
    report = FuzzReport()
    run_case(case, tmp_path / "two", report)
    assert report.mismatched and not report.missing and not report.repeated
