"""The README's way with one's own recordings, from a manifest to training steps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STEPS = {"pretrain": 6, "align": 4, "ia_sft": 6, "joint": 4}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["en_read", "zh_words"])
def test_real_recordings_train_without_a_dropped_sample(
    tmp_path, recordings, name, command, alone, monkeypatch
):
    pytest.importorskip("espeakng_loader")
    monkeypatch.chdir(tmp_path)

    def dsasr(*words) -> str:
        done = command(*words)
        assert done.returncode == 0, f"{words}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done.stdout

    manifests = [recordings / name / f"{split}.jsonl" for split in ("train", "valid")]
    dsasr("data", "make-shards", *manifests, "--out-root", "shards")
    for split in ("train", "valid"):
        assert "bad: none" in dsasr("data", "verify", f"shards/{split}")
    dsasr("data", "cmvn", "shards/train", "--out", "cmvn.json")
    dsasr("data", "phonemes", "shards/train", "--out", "phonemes.json", "--kind", "espeak")
    rows = manifests[0].read_text(encoding="utf-8").splitlines()
    (tmp_path / "text.txt").write_text("\n".join(json.loads(row)["text"] for row in rows))
    dsasr("data", "tokenizer", "text.txt", "--out", "tokenizer", "--size", 1800)
    dsasr(
        "demo", "lm", "text.txt", "--tokenizer", "tokenizer", "--out", "lm",
        *("--steps", 2, "--hidden", 32, "--ffn", 64),
    )  # fmt: skip
    done = alone(
        ROOT / "dsasr" / "train.py", "--recipe", "demo", "run=run",
        "data.cmvn=cmvn.json", "data.phonemes=phonemes.json", "data.phonemizer.kind=espeak",
        "data.train.demo.shards=shards/train", "data.valid.demo-valid.shards=shards/valid",
        "model.tokenizer=lm", "model.llm.path=lm", "model.encoder.layers=1",
        "stages.ia_sft.steps_after_final_swap=2", "drift.probe_utterances=4",
        "data.dataloader.batch.frames=6000", "data.dataloader.batch.max_seconds=25",
        *(f"stages.{stage}.steps={steps}" for stage, steps in STEPS.items()),
        *(f"stages.{stage}.warmup_steps=2" for stage in STEPS),
        cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    lines = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").open(encoding="utf-8")]
    assert {line["stage"] for line in lines} >= set(STEPS)
    assert all(line.get("bad_samples", 0) == 0 for line in lines)
    bad = tmp_path / "run" / "bad_samples.jsonl"
    assert not bad.exists() or not bad.read_text()
