"""Rows of several checkpoints: the table, and the files they go to."""

from __future__ import annotations

import json
import math

from dsasr.analysis import probe_checkpoints
from dsasr.entropy_allocation.allocation_row import AllocationRow, EncoderSource, Estimate


def estimate(value: float, **values) -> Estimate:
    numbers = {"low": value - 0.1, "high": value + 0.1, "entropy_before": 2.0}
    return Estimate(value, **numbers | {"shuffled": 0.004, **values})


def row(pai: Estimate, csai: Estimate) -> AllocationRow:
    source = EncoderSource("x", "checkpoint")
    return AllocationRow(source, nse=0.5, effective_rank=3.0, pai=pai, csai=csai)


def test_the_table_shows_what_is_not_detected_and_failed_probes():
    nothing = estimate(0.0, low=0.0, high=0.0, shuffled=math.nan, detection_limit=0.0123)
    rows = [
        row(estimate(0.5), nothing),
        row(estimate(-0.5), estimate(0.0, entropy_before=0.0)),
        row(estimate(0.0), estimate(0.25)),
    ]
    _, *lines = (" ".join(x.split()) for x in probe_checkpoints.table(rows).splitlines())
    assert "0.500 0.40…0.60 [0.00] 25.0% none (<0.012) [–] 0.0%" in lines[0]
    assert "-0.500 -0.60…-0.40 [0.00] underfit -25.0% none [0.00] –" in lines[1]
    assert "none [0.00] 0.0% 0.250 0.15…0.35 [0.00] 12.5%" in lines[2]


def test_the_table_shows_the_control_of_phonemes_alone():
    # The interval is above 0 and the shuffled control, but phonemes alone give as much.
    second_way = estimate(0.25, phoneme_only=0.16)
    found = estimate(0.25, phoneme_only=0.14)
    rows = [row(estimate(0.5), second_way), row(estimate(0.5), found)]
    _, *lines = (" ".join(x.split()) for x in probe_checkpoints.table(rows).splitlines())
    assert lines[0].endswith("none [0.00 0.160] 12.5% – – – – – –")
    assert lines[1].endswith("0.250 0.15…0.35 [0.00 0.140] 12.5% – – – – – –")


def rows_of(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def names(path) -> list[str]:
    return [r["encoder"]["name"] for r in rows_of(path)]


def test_rows_go_to_their_runs_or_to_one_file(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    sources = [
        EncoderSource("first/a", "checkpoint", run=str(first)),
        EncoderSource("second/b", "checkpoint", run=f"{first}/../second"),
        EncoderSource("whisper", "pretrained", path="whisper"),
        EncoderSource("random encoder", "random", run=str(second)),
    ]
    rows = [AllocationRow(source) for source in sources]
    settings = {"data": "shards"}
    files = probe_checkpoints.RowFiles(str(first), settings)
    files.write(rows[:2])  # rows are there as soon as they are measured
    assert names(first / "allocation.jsonl") == ["first/a"]
    assert names(second / "allocation.jsonl") == ["second/b"]
    files.write(rows)
    assert names(first / "allocation.jsonl") == ["first/a", "whisper"]
    [_, random] = rows_of(second / "allocation.jsonl")
    assert random["encoder"]["name"] == "random encoder" and random["settings"] == settings
    assert f"written: {second}/allocation.jsonl (second/b, random encoder)" in files.messages()
    probe_checkpoints.RowFiles(str(first), settings, tmp_path / "all.jsonl").write(rows)
    assert names(tmp_path / "all.jsonl") == [source.name for source in sources]


def test_rows_with_other_settings_are_replaced(tmp_path):
    def write(name: str, settings: dict) -> str:
        row = AllocationRow(EncoderSource(name, "checkpoint", run=str(tmp_path)))
        files = probe_checkpoints.RowFiles(str(tmp_path), settings)
        files.write([row])
        files.write([row])  # once more, with the next
        [message] = files.messages()
        return message

    write("run/a", {"data": "x"})
    assert "removed" not in write("run/b", {"data": "x"})
    assert names(tmp_path / "allocation.jsonl") == ["run/a", "run/b"]
    assert "2 measured with other settings removed" in write("run/c", {"data": "y"})
    assert names(tmp_path / "allocation.jsonl") == ["run/c"]
    # A row of another version, which has no settings, goes too.
    with (tmp_path / "allocation.jsonl").open("a") as file:
        file.write('{"name": "run/old", "measured": {"data": "y"}}\n')
    assert "1 measured with other settings removed" in write("run/d", {"data": "y"})
