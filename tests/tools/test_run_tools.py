"""Tools that read a run folder, on one tiny run: allocation, evaluation, report."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


def tool(name: str, *arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "tools" / name), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


@pytest.fixture(scope="module")
def run(launch, tiny, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tools") / "run"
    train = ROOT / "dsasr" / "train.py"
    done = launch(train, "--recipe", tiny, f"run={folder}", ranks=1)
    assert done.returncode == 0, done.stdout[-3000:]
    return folder


@pytest.mark.launcher
def test_allocation_of_run_snapshots_and_foreign_encoders(run, tiny, tmp_path):
    from transformers import HubertConfig, HubertModel

    HubertModel(
        HubertConfig(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
            conv_dim=(8,) * 7, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
        )
    ).save_pretrained(tmp_path / "hubert")  # fmt: skip
    snapshots = sorted((run / "snapshots").glob("encoder-*"))
    data = tiny.parent / "valid"
    out = tmp_path / "rows.jsonl"
    done = tool(
        "allocation.py", snapshots[0], run, tmp_path / "hubert", "--data", data, "--out", out
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [r["kind"] for r in rows] == ["snapshot", "random", "checkpoint", "foreign", "random"]
    assert all(0 <= r["nse"] <= 1 and r["effective_rank"] >= 1 for r in rows)
    last = rows[2]
    assert last["stage"] == "joint" and last["utterances"] == 8
    assert last["llm"]["resolved"] == pytest.approx(
        last["llm"]["without_audio"] - last["llm"]["with_audio"]
    )
    assert 0 <= last["ctc"]["frames"] <= math.log(10) and 0 < last["cka_to_first"] <= 1
    assert "PAI" in done.stdout and "hubert" in done.stdout
    tokens = tool("allocation.py", run, "--data", data, "--semantic", "token", "--no-random")
    assert tokens.returncode == 0, tokens.stderr
    [row] = [json.loads(x) for x in (run / "allocation.jsonl").read_text().splitlines()]
    assert row["kind"] == "checkpoint" and row["csai"]["frames"] == last["csai"]["frames"]
    assert tool("allocation.py", tmp_path / "hubert", "--data", data).returncode == 2


@pytest.mark.launcher
def test_evaluation_with_the_whole_suite_and_against_another(run, tiny, tmp_path):
    given = [run, "--data", tiny.parent / "valid", "--suite", "--clips", 1, "--limit", 3]
    done = tool("evaluate.py", *given, "--report", "--out", tmp_path / "rows.jsonl")
    assert done.returncode == 0, done.stderr
    found = json.loads((run / "report.json").read_text())
    assert list(found["conditions"]) == ["clean", "snr20", "snr10", "snr5", "snr0"]
    assert {r["condition"] for r in found["hallucination"]["rows"]} >= {"silence", "cut50", "clean"}
    assert [r["stage"] for r in found["stages"]][-1] == "joint"
    assert (run / "transcripts.jsonl").read_text() == (tmp_path / "rows.jsonl").read_text()
    # What the run transcribes is judged by other rules where they are given.
    (tmp_path / "normalizer.json").write_text(json.dumps({"ba": "do"}))
    spelled = tool("evaluate.py", *given[:3], "--rules", tmp_path / "normalizer.json")
    assert spelled.returncode == 0, spelled.stderr
    wrong = tool("evaluate.py", *given[:3], "--rules", "whisper")
    assert wrong.returncode == 2 and "--rules must be one of standard, plain" in wrong.stderr
    again = tool("evaluate.py", *given, "--against", run)
    assert again.returncode == 0, again.stderr
    assert "errors +0.00 (+0.00…+0.00), p 1.000" in again.stdout
    other = tool("evaluate.py", run, "--data", tiny.parent / "valid", "--against", run)
    assert other.returncode == 2 and "other cases" in other.stderr


@pytest.mark.launcher
def test_report_of_a_run(run, tmp_path):
    done = tool("report.py", run, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "index.html").read_text()
    assert "Course of run" in page and "<h2>Stages</h2>" in page
    assert tool("report.py", tmp_path).returncode == 2
