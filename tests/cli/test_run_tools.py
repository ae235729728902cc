"""Tools that read a run folder, on one tiny run: allocation, evaluation, report."""

from __future__ import annotations

import importlib.util
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dsasr.data.shards.writer import shard_summary, write_dataset, write_shard

ROOT = Path(__file__).parent.parent.parent


def tool(name: str, *arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "tools" / name), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def module(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    held = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(held)
    return held


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


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
    held = rows(out)
    kinds = [r["encoder"]["kind"] for r in held]
    assert kinds == ["snapshot", "random", "checkpoint", "pretrained", "random"]
    assert all(0 <= r["nse"] <= 1 and r["effective_rank"] >= 1 for r in held)
    assert {(r["pai"]["folds"], r["pai"]["split_by"]) for r in held} == {(4, "utterance")}
    last = held[2]
    assert last["encoder"]["stage"] == "joint" and last["utterances"] == 8
    assert last["reference"] == held[0]["encoder"]["name"] and "reference" not in held[0]
    # The limit is searched at most once.
    for key in ("pai", "csai"):
        assert sum("detection_limit" in r[key] for r in held) <= 1
    assert last["llm"]["resolved"] == pytest.approx(
        last["llm"]["nll_without_audio"] - last["llm"]["nll_with_audio"]
    )
    assert 0 <= last["ctc"]["entropy"] <= math.log(10) and 0 < last["cka_to_reference"] <= 1
    assert "PAI" in done.stdout and "hubert" in done.stdout
    tokens = tool("allocation.py", run, "--data", data, "--semantic", "token", "--random", "none")
    assert tokens.returncode == 0, tokens.stderr
    [row] = rows(run / "allocation.jsonl")
    assert (
        row["encoder"]["kind"] == "checkpoint" and row["csai"]["frames"] == last["csai"]["frames"]
    )
    assert tool("allocation.py", tmp_path / "hubert", "--data", data).returncode == 2


@pytest.mark.launcher
def test_allocation_of_two_runs_on_what_whisper_can_read(run, tiny, tmp_path):
    """Each run's rows go into its own folder, and all encoders are shown the same recordings."""
    from transformers import WhisperConfig, WhisperModel

    WhisperModel(
        WhisperConfig(
            vocab_size=64, d_model=16, encoder_layers=1, decoder_layers=1,
            encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=32,
            decoder_ffn_dim=32, max_source_positions=50, max_target_positions=16,
            pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
        )
    ).save_pretrained(tmp_path / "whisper")  # fmt: skip
    corpus = module(ROOT / "tests" / "programs" / "tiny.py")
    rng, samples = np.random.default_rng(1), []
    for i, count in enumerate((2, 3, 4, 6, 3, 2)):  # six words take 1.25 s, Whisper reads one
        words = [corpus.WORDS[w] for w in rng.integers(0, 4, count)]
        samples.append(corpus._packed(f"x{i}", corpus._say(words, rng), words))
    shard = tmp_path / "data" / "000000.tar"
    shard.parent.mkdir()
    write_dataset(shard.parent, [shard_summary(shard, write_shard(shard, samples))], 1)
    other = shutil.copytree(run, tmp_path / "other")
    given = [other, run, tmp_path / "whisper", "--data", shard.parent, "--control", "first"]
    done = tool("allocation.py", *given, "--aligner", run)
    assert done.returncode == 0, done.stderr
    assert "5 utterances by 1 speakers" in done.stdout and "'too_long': 1" in done.stdout
    for folder in (run, other):
        assert f"written: {folder}/allocation.jsonl ({folder.name}/step-" in done.stdout
    first = rows(other / "allocation.jsonl")
    assert [r["encoder"]["kind"] for r in first] == ["checkpoint", "random"]
    assert ["shuffled" in r["pai"] for r in first] == [True, False]
    held = rows(run / "allocation.jsonl")
    kinds = [r["encoder"]["kind"] for r in held]
    assert kinds == ["checkpoint", "random", "pretrained", "random"]
    assert {r["utterances"] for r in held} == {5}
    assert not any("shuffled" in r["pai"] for r in held)


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
    sounds = found["hallucination"]["nonspeech"]
    assert sounds["all"]["clips"] == 4 and sounds["silence"]["low"] is None
    # The newest checkpoint by its name; what is not the run's end does not go into its report.
    last = sorted(p.name for p in (run / "checkpoints").glob("step-*"))[-1]
    named = tool("evaluate.py", *given, "--checkpoint", last, "--out", tmp_path / "named.jsonl")
    assert named.returncode == 0, named.stderr
    assert (tmp_path / "named.jsonl").read_text() == (tmp_path / "rows.jsonl").read_text()
    refused = tool("evaluate.py", *given, "--checkpoint", last, "--report")
    assert refused.returncode == 2 and "--out" in refused.stderr
    missing = tool("evaluate.py", *given, "--checkpoint", "step-1")
    assert missing.returncode == 2 and last in missing.stderr
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
