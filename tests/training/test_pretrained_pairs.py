"""Short trainings with published weights: Whisper base with its decoder, and with SmolLM2-135M."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
from transformers import AutoTokenizer

from dsasr import recipe
from dsasr.build import Builder
from dsasr.tracking.run_log import is_finished, read_metrics

ROOT = Path(__file__).parents[2]
READ = ROOT.parent / "shared" / "data" / "en_read"
SENTENCES = ("it is easy to be happy", "this is a waste of money", "the weather is very nice",
             "i will see you in the morning", "we had a great time at the beach",
             "what are you going to do today")  # fmt: skip
BATCH = "{frames: 1200, samples: 4, max_seconds: 30}"


def read_rows() -> list[dict]:
    """A manifest of short utterances of read English, by rising length."""
    lines = (READ / "train.jsonl").read_text(encoding="utf-8").splitlines()
    rows = sorted(map(json.loads, lines), key=lambda row: row["duration"])[:400:25]
    return [row | {"audio": str(READ / row["audio"])} for row in rows]


def noise_rows(folder: Path) -> list[dict]:
    """A manifest of noise that is said to be English."""
    rng, rows = np.random.default_rng(0), []
    for i, text in enumerate(SENTENCES * 2):
        path = folder / f"{i}.wav"
        soundfile.write(path, rng.normal(0, 0.05, 40_000 + 1_000 * i).astype(np.float32), 16_000)
        rows.append({"id": str(i), "audio": str(path), "text": text, "lang": "en"})
    return rows


@pytest.fixture(scope="module")
def corpus(command, tmp_path_factory) -> Path:
    """A folder with shards/train, shards/valid, characters.json and text.txt: real speech where it
    lies beside the checkout, noise elsewhere."""
    folder = tmp_path_factory.mktemp("corpus")
    rows = read_rows() if READ.is_dir() else noise_rows(folder)
    manifests = []
    for name, part in (("train", rows[:-4]), ("valid", rows[-4:])):
        manifests.append(folder / f"{name}.jsonl")
        manifests[-1].write_text("".join(json.dumps(row) + "\n" for row in part))
    (folder / "text.txt").write_text("".join(row["text"].lower() + "\n" for row in rows))
    phonemes = ("--out", folder / "characters.json", "--kind", "characters")
    for words in (
        ("make-shards", *manifests, "--out-root", folder / "shards"),
        ("phonemes", folder / "shards" / "train", *phonemes),
    ):
        done = command("data", *words)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder


def overrides(run: Path, corpus: Path, encoder: Path, llm: Path, steps: dict[str, int]) -> list:
    return [
        f"run={run}", f"model.encoder.path={encoder}", f"model.llm.path={llm}",
        f"data.train=[{{name: train, shards: {corpus}/shards/train}}]",
        f"data.valid=[{{name: valid, shards: {corpus}/shards/valid}}]",
        f"data.dataloader={{num_workers: 0, batch: {BATCH}}}",
        *(f"stages.{stage}.steps={count}" for stage, count in steps.items()),
        *(f"stages.{stage}.warmup_steps=0" for stage in steps),
        "monitor.every=1", "monitor.tensorboard=false", "evaluation.decode.max_tokens=8",
    ]  # fmt: skip


@pytest.fixture
def losses(alone, tmp_path):
    """``losses(recipe, overrides)``: train, and the finite losses of each stage's steps, in order;
    the run's weights, up to a GB, are removed."""

    def train(name: str, changes: list) -> dict[str, list[float]]:
        run = tmp_path / "run"
        done = alone(ROOT / "dsasr" / "train.py", "--recipe", name, *changes, timeout=600)
        assert done.returncode == 0, done.stdout[-3000:]
        assert is_finished(run)
        shutil.rmtree(run / "checkpoints")
        shutil.rmtree(run / "snapshots", ignore_errors=True)
        found: dict[str, list[float]] = {}
        for row in read_metrics(run):
            if "step" in row:
                loss = row["ctc"] if row["branch"] == "pretrain" else row["nll"]
                assert loss is not None and math.isfinite(loss), row
                found.setdefault(row["stage"], []).append(loss)
        return found

    return train


@pytest.mark.slow
def test_whisper_and_its_decoder(whisper_base, corpus, losses, tmp_path):
    steps = {"head": 1, "tune": 1, "read": 2, "ia_sft": 2, "joint": 1}
    lm = whisper_base.with_name("whisper-base-lm")
    found = losses("whisper-read", [
        *overrides(tmp_path / "run", corpus, whisper_base, lm, steps),
        f"data.phonemes={corpus}/characters.json", f"data.text_only.path={corpus}/text.txt",
        "data.text_only.samples=4", f"stages.tune.batch={BATCH}", f"stages.joint.batch={BATCH}",
    ])  # fmt: skip
    assert {stage: len(values) for stage, values in found.items()} == steps
    # An untrained language model: ln(51,865) = 10.9.
    assert found["read"][0] < 6.5


@pytest.mark.slow
def test_whisper_and_smollm2_with_lora(whisper_base, smollm2, corpus, losses, tmp_path):
    pytest.importorskip("peft")
    steps = {"align": 2, "sft": 2}
    changes = [
        *overrides(tmp_path / "run", corpus, whisper_base, smollm2, steps),
        "data.text.case=lower", "model.adaptor.hidden=64", "model.lora.rank=8",
    ]  # fmt: skip
    found = losses("whisper-qwen3", changes)
    assert {stage: len(values) for stage, values in found.items()} == steps
    # An untrained language model: ln(49,152) = 10.8.
    assert found["align"][0] < 8
    check_chat_prompt(Builder(recipe.load("whisper-qwen3", changes)), smollm2)


def check_chat_prompt(builder: Builder, llm: Path) -> None:
    """The prompt is what the model's chat template makes of its two messages."""
    theirs = AutoTokenizer.from_pretrained(llm)
    prefix, suffix = builder.prompt()
    prompt = theirs.decode(prefix) + "<speech>" + theirs.decode(suffix)
    roles = re.findall(r"<\|im_start\|>(system|user)\n(.*?)<\|im_end\|>\n", prompt)
    assert [role for role, _ in roles] == ["system", "user"] and "<speech>" in roles[1][1]
    messages = [{"role": role, "content": text} for role, text in roles]
    options = {"tokenize": False, "add_generation_prompt": True}
    assert theirs.apply_chat_template(messages, **options) == prompt
    assert theirs.convert_ids_to_tokens(builder.tokenizer.end_id) == "<|im_end|>"
