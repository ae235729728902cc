"""The corpus that the memory of whole-corpus commands is measured on."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from dsasr.utils.io import read_json_lines

BENCH = Path(__file__).parent.parent.parent / "tools" / "bench"


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    import corpus_memory

    monkeypatch.setattr(corpus_memory, "FILES", 3)
    yield corpus_memory
    sys.modules.pop("corpus_memory")


def test_each_row_has_a_file_of_its_own(bench, tmp_path):
    rows = read_json_lines(bench.make_corpus(tmp_path / "c", 7) / "train.jsonl")
    assert len({row["audio"] for row in rows}) == len({row["id"] for row in rows}) == 7
    assert all(
        Path(row["audio"]).stat().st_nlink > 1 and 0.5 <= row["duration"] <= 2 for row in rows
    )
    assert rows[0]["duration"] == rows[3]["duration"] == rows[6]["duration"]


def test_the_peak_of_a_command_is_recorded(bench, monkeypatch):
    told = {}
    monkeypatch.setattr(bench, "record", lambda name, **fields: told.update(fields))
    monkeypatch.setattr(bench, "DSASR", (sys.executable, "-c"))
    bench.measure("hog", 5, "x = bytearray(300 << 20)")
    assert told["utterances"] == 5 and 300 <= told["peak_mb"] < 400


def test_a_command_that_fails_is_told(bench, monkeypatch):
    monkeypatch.setattr(bench, "DSASR", (sys.executable, "-c"))
    with pytest.raises(bench.UserError, match="boom"):
        bench.measure("bad", 5, "raise SystemExit('boom')")
