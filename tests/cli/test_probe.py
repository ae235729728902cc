"""`dsasr probe` on a run, its snapshots and encoders of Hugging Face."""

from __future__ import annotations

import importlib.util
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest

from dsasr.data.shards.writer import shard_summary, write_dataset, write_shard

ROOT = Path(__file__).parents[2]


def load_module(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.launcher
@pytest.mark.slow
def test_a_run_its_snapshots_and_pretrained_encoders(trained, tiny, tmp_path, command):
    from transformers import HubertConfig, HubertModel

    HubertModel(
        HubertConfig(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
            conv_dim=(8,) * 7, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
        )
    ).save_pretrained(tmp_path / "hubert")  # fmt: skip
    snapshots = sorted((trained / "snapshots").glob("encoder-*"))
    data = tiny.parent / "valid"
    out = tmp_path / "rows.jsonl"
    done = command(
        "probe", snapshots[0], trained, tmp_path / "hubert", "--data", data, "--out", out
    )
    assert done.returncode == 0, done.stderr
    measured = rows(out)
    kinds = [r["encoder"]["kind"] for r in measured]
    assert kinds == ["snapshot", "random", "checkpoint", "pretrained", "random"]
    assert all(0 <= r["nse"] <= 1 and r["effective_rank"] >= 1 for r in measured)
    assert {(r["pai"]["folds"], r["pai"]["split_by"]) for r in measured} == {(4, "utterance")}
    last = measured[2]
    assert last["encoder"]["stage"] == "joint" and last["utterances"] == 8
    assert last["reference"] == measured[0]["encoder"]["name"] and "reference" not in measured[0]
    # The limit is measured once, unless no limit can be missed.
    for key in ("pai", "csai"):
        assert sum("detection_limit" in r[key] for r in measured) <= 1
    assert last["llm"]["resolved"] == pytest.approx(
        last["llm"]["nll_without_audio"] - last["llm"]["nll_with_audio"]
    )
    assert 0 <= last["ctc"]["entropy"] <= math.log(10) and 0 < last["cka_to_reference"] <= 1
    assert "PAI" in done.stdout and "hubert" in done.stdout
    tokens = command("probe", trained, "--data", data, "--semantic", "token", "--random", "none")
    assert tokens.returncode == 0, tokens.stderr
    [row] = rows(trained / "allocation.jsonl")
    assert (
        row["encoder"]["kind"] == "checkpoint" and row["csai"]["frames"] == last["csai"]["frames"]
    )
    assert command("probe", tmp_path / "hubert", "--data", data).returncode == 2


@pytest.mark.slow
@pytest.mark.launcher
def test_two_runs_on_recordings_that_whisper_can_read(trained, tiny, tmp_path, command):
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
    corpus = load_module(ROOT / "tests" / "programs" / "tiny.py")
    rng, samples = np.random.default_rng(1), []
    for i, count in enumerate((2, 3, 4, 6, 3, 2)):  # six words take 1.25 s, Whisper reads one
        words = [corpus.WORDS[w] for w in rng.integers(0, 4, count)]
        samples.append(corpus._packed(f"x{i}", corpus._say(words, rng), words))
    shard = tmp_path / "data" / "000000.tar"
    shard.parent.mkdir()
    write_dataset(shard.parent, [shard_summary(shard, write_shard(shard, samples))], 1)
    other = shutil.copytree(trained, tmp_path / "other")
    arguments = [other, trained, tmp_path / "whisper", "--data", shard.parent, "--control", "first"]
    done = command("probe", *arguments, "--aligner", trained)
    assert done.returncode == 0, done.stderr
    assert "5 utterances by 1 speakers" in done.stdout and "'too_long': 1" in done.stdout
    for folder in (trained, other):
        assert f"written: {folder}/allocation.jsonl ({folder.name}/step-" in done.stdout
    first = rows(other / "allocation.jsonl")
    assert [r["encoder"]["kind"] for r in first] == ["checkpoint", "random"]
    assert ["shuffled" in r["pai"] for r in first] == [True, False]
    measured = rows(trained / "allocation.jsonl")
    kinds = [r["encoder"]["kind"] for r in measured]
    assert kinds == ["checkpoint", "random", "pretrained", "random"]
    assert {r["utterances"] for r in measured} == {5}
    assert not any("shuffled" in r["pai"] for r in measured)
