"""A recipe that trains in seconds: 60 utterances of tones, a 16-wide encoder, a one-layer LM.

The `tiny` fixture builds it; each "word" is a tone of its own, so that training can learn it.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import soundfile
import torch
import yaml

from dsasr.data.audio.features import Cmvn, FbankConfig, fbank
from dsasr.data.audio.resampling import RATE
from dsasr.data.shards.writer import PackedSample, shard_summary, write_dataset, write_shard
from dsasr.data.text.phoneme_vocab import PhonemeVocab
from dsasr.data.text.train_tokenizer import train_tokenizer
from dsasr.demo.small_lm import SmallLmConfig, make_small_lm

WORDS = ("ba", "do", "fi", "gu")


def make(folder: Path) -> Path:
    """Write the corpus, the language model and the recipe; returns the recipe's path."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    features, texts = [], []
    for name, numbers in (("train", (20, 20, 12)), ("valid", (8,))):
        rows = []
        for shard, count in enumerate(numbers):
            samples = []
            for i in range(count):
                words = [WORDS[w] for w in rng.integers(0, 4, rng.integers(2, 5))]
                wave = _say(words, rng)
                features.append(fbank(torch.from_numpy(wave), FbankConfig()))
                texts.append(" ".join(words))
                samples.append(_packed(f"{name}{shard}-{i:02d}", wave, words))
            path = folder / name / f"{shard:06d}.tar"
            path.parent.mkdir(exist_ok=True)
            rows.append(shard_summary(path, write_shard(path, samples)))
        write_dataset(folder / name, rows, 1)
    Cmvn.accumulate(features, 80).save(folder / "cmvn.json")
    PhonemeVocab.build([list("".join(WORDS))]).save(folder / "phonemes.json")
    (folder / "text").write_text("\n".join(texts * 4))
    train_tokenizer([folder / "text"], folder / "tokenizer", size=300)
    shape = SmallLmConfig(
        hidden=16, layers=1, heads=2, kv_heads=1, head_dim=8, ffn=32, steps=2, batch=8
    )
    make_small_lm([folder / "text"], folder / "tokenizer", folder / "lm", shape, progress=False)
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(recipe(folder), sort_keys=False))
    return path


def _say(words: list[str], rng: np.random.Generator) -> np.ndarray:
    parts = [rng.normal(0, 0.01, int(0.05 * RATE))]
    for word in words:
        time = np.arange(int(0.16 * RATE)) / RATE
        parts.append(0.3 * np.sin(2 * np.pi * 300 * 1.8 ** WORDS.index(word) * time))
        parts.append(rng.normal(0, 0.01, int(0.04 * RATE)))
    return np.concatenate(parts).astype(np.float32)


def _packed(key: str, wave: np.ndarray, words: list[str]) -> PackedSample:
    buffer = io.BytesIO()
    soundfile.write(buffer, wave, RATE, format="FLAC", subtype="PCM_16")
    values = {"text": " ".join(words), "lang": "en", "speaker": "s"}
    values |= {"duration": len(wave) / RATE, "phonemes": list("".join(words))}
    return PackedSample(key, "flac", buffer.getvalue(), values)


def recipe(folder: Path) -> dict:
    both = {"adaptor": 1e-3, "llm": 1e-3}
    return {
        "run": str(folder / "run"),
        "data": {
            "train": [{"name": "tiny", "shards": str(folder / "train")}],
            "valid": [{"name": "valid", "shards": str(folder / "valid")}],
            "cmvn": str(folder / "cmvn.json"),
            "phonemes": str(folder / "phonemes.json"),
            "augment": {"speeds": [1.0], "noise_share": 0.0},
            "dataloader": {"num_workers": 0, "batch": {"frames": 400, "min_seconds": 0.05}},
        },
        "model": {
            "encoder": {"width": 16, "layers": 1, "heads": 2, "ffn": 32, "kernel": 5,
                        "subsample_channels": 4},
            "adaptor": {"stack": 4, "hidden": 16},
            "llm": {"path": str(folder / "lm")},
        },
        "drift": {"start": 0.2, "interval": 0.1, "threshold": 0.999, "probe_utterances": 4},
        "stages": [
            {"name": "pretrain", "branch": "pretrain", "trains": {"encoder": 5e-3, "ctc": 5e-3},
             "steps": 20, "warmup_steps": 2},
            {"name": "align", "branch": "sft", "trains": {"adaptor": 2e-3}, "steps": 4},
            {"name": "ia_sft", "branch": "sft", "trains": both, "steps": 14, "swaps": True,
             "steps_after_final_swap": 3},
            {"name": "joint", "branch": "sft", "trains": {"encoder": 1e-4, **both}, "steps": 4},
        ],
        "monitor": {"every": 3, "tensorboard": False},
        "checkpoint": {"every_minutes": 0, "every_steps": 7, "keep": 10},
        "store": {"poll_seconds": 0.05, "keep": 50},
        "evaluation": {"decode": {"max_tokens": 8}},
    }  # fmt: skip
