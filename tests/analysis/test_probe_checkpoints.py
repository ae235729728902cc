from __future__ import annotations

import json
import math
from pathlib import Path

from dsasr.analysis import probe_checkpoints


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rows_go_to_their_runs_or_to_one_file(tmp_path, capsys):
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    new = [
        {"name": "first/a", "run": str(first)},
        {"name": "second/b", "run": f"{first}/../second"},
        {"name": "whisper", "kind": "foreign"},
        {"name": "random encoder", "run": str(second), "nse": math.nan},
    ]
    measured = {"data": "shards"}
    probe_checkpoints.write(new, str(first), measured, None)
    assert [r["name"] for r in rows(first / "allocation.jsonl")] == ["first/a", "whisper"]
    [_, random] = rows(second / "allocation.jsonl")
    assert (random["name"], random["nse"], random["measured"]) == ("random encoder", None, measured)
    assert f"{second}/allocation.jsonl (second/b, random encoder)" in capsys.readouterr().out
    probe_checkpoints.write(new, str(first), measured, tmp_path / "all.jsonl")
    assert [r["name"] for r in rows(tmp_path / "all.jsonl")] == [r["name"] for r in new]
    # Another checkpoint of the run, measured alike, is beside the first one; otherwise instead.
    other = {"name": "first/c", "run": str(first)}
    for settings, names in (
        (measured, ["whisper", "first/a", "first/c"]),
        ({"data": "x"}, ["first/c"]),
    ):
        probe_checkpoints.write([other], str(first), settings, None)
        printed = capsys.readouterr().out
        assert ("2 measured otherwise left out" in printed) == (settings != measured)
        assert sorted(r["name"] for r in rows(first / "allocation.jsonl")) == sorted(names)
