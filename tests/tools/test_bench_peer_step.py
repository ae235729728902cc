from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from transformers import WhisperFeatureExtractor

from dsasr.data.shards.pack import PackConfig, pack
from dsasr.data.text.tokenizers import load_tokenizer
from dsasr.model.adaptors.protocol import AdaptorConfig
from dsasr.utils.errors import UserError

BENCH = Path(__file__).parent.parent.parent / "tools" / "bench"


@pytest.fixture(scope="module")
def lm(tiny) -> str:
    return str(tiny.parent / "lm")


@pytest.fixture(scope="module")
def manifest(tmp_path_factory) -> Path:
    """Twelve recordings of 0.6 to 1.7 s."""
    folder = tmp_path_factory.mktemp("recordings")
    rng, rows = np.random.default_rng(0), []
    for i in range(12):
        samples = 9600 + 1600 * i
        wave = 0.1 * rng.standard_normal(samples)
        soundfile.write(folder / f"{i}.wav", wave, 16000)
        text = " ".join(["ba", "do", "fi"][: 1 + i % 3])
        row = {"id": f"u{i}", "text": text, "audio": f"{i}.wav", "duration": samples / 16000}
        rows.append(json.dumps(row))
    (folder / "all.jsonl").write_text("\n".join(rows))
    return folder / "all.jsonl"


@pytest.fixture
def peer(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    for name in ("common", "marks", "peer_trainer", "peer_sides"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import peer_trainer

    return peer_trainer


def rows_of(manifest: Path) -> list[SimpleNamespace]:
    rows = [json.loads(x) for x in manifest.read_text().splitlines()]
    return [
        SimpleNamespace(text=r["text"], lang="en", audio=manifest.parent / r["audio"]) for r in rows
    ]


def collated(peer, manifest, lm, longest: bool) -> dict:
    tokenizer = load_tokenizer(lm)
    extractor = WhisperFeatureExtractor(feature_size=80)
    return peer.SpeechCollator(extractor, tokenizer, 8, longest)(rows_of(manifest)[:3])


def test_labels_are_the_transcript_alone_and_padding_is_on_the_right(peer, manifest, lm):
    tokenizer = load_tokenizer(lm)
    batch = collated(peer, manifest, lm, longest=False)
    assert batch["input_features"].shape == (3, 80, 3000)
    for i, text in enumerate(("ba", "ba do", "ba do fi")):
        length = int(batch["attention_mask"][i].sum())
        ids, labels = batch["input_ids"][i], batch["labels"][i]
        target = [*tokenizer.encode(text), tokenizer.end_id]
        assert labels[labels != peer.IGNORED].tolist() == target
        assert ids[length - len(target) : length].tolist() == target
        assert (ids[length:] == tokenizer.pad_id).all()
        # 100 Mel frames a second, halved, in stacks of eight.
        samples = 9600 + 1600 * i
        assert (ids == peer.AUDIO).sum() == -(-(samples // 160) // 2 // 8)
    longest = collated(peer, manifest, lm, longest=True)
    assert longest["input_features"].shape[2] == 80


@pytest.mark.parametrize("num_items", [None, 7])
def test_the_fused_head_gives_the_peers_own_loss(peer, manifest, whisper, lm, num_items):
    batch = collated(peer, manifest, lm, longest=False)
    batch.pop("seconds")
    losses, gradients = [], []
    for fused in (False, True):
        torch.manual_seed(0)
        options = peer.PeerOptions(fused=fused)
        model = peer.load_model(str(whisper), lm, AdaptorConfig(stack=8), options).train()
        model.freeze(("adaptor", "llm"))
        loss = model(**batch, num_items_in_batch=num_items)["loss"]
        loss.backward()
        losses.append(loss.detach())
        gradients.append(model.projector[0].weight.grad)
        assert all(p.grad is None for p in model.encoder.parameters())
    torch.testing.assert_close(*losses, rtol=1e-5, atol=0)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def test_an_encoder_for_any_length_is_whispers_own_at_30_seconds(peer, manifest, whisper, lm):
    batch = collated(peer, manifest, lm, longest=False)
    frames = []
    for longest in (False, True):
        options = peer.PeerOptions(longest=longest)
        model = peer.load_model(str(whisper), lm, AdaptorConfig(stack=8), options)
        frames.append(model.encode(batch["input_features"]).detach())
    torch.testing.assert_close(*frames)


def test_this_projects_adaptor_gives_the_peers_own_loss(peer, manifest, whisper, lm):
    batch = collated(peer, manifest, lm, longest=False)
    batch.pop("seconds")
    losses = []
    for adaptor in (False, True):
        torch.manual_seed(0)
        options = peer.PeerOptions(adaptor=adaptor)
        model = peer.load_model(str(whisper), lm, AdaptorConfig(stack=8), options).train()
        losses.append(model(**batch)["loss"].detach())
    torch.testing.assert_close(*losses, rtol=1e-5, atol=0)


def test_a_recipes_model_is_the_same_on_both_sides(peer, manifest, tiny, tmp_path, monkeypatch):
    import peer_sides

    for module in (peer_sides.collate, peer):  # `check` replaces them
        monkeypatch.setattr(module, "decode", module.decode)
    options = SimpleNamespace(
        recipe=str(tiny), data=str(manifest), encoder="", llm="", stack=8, pack=0, workers=0,
        matmul="highest", deepspeed="zero1", utterances=2, mean_seconds=1.1, longest_seconds=1.7,
        folder=str(tmp_path), shards=str(tmp_path / "shards"),
    )  # fmt: skip
    pack(peer_sides.manifest_rows(options), tmp_path / "shards", PackConfig())
    found = peer_sides.check(options, peer_sides.Side.parse("ours"), "all")
    assert max(found.values()) < 1e-4


def test_an_unknown_side_is_named(peer):
    import peer_sides

    side = peer_sides.Side.parse("peer+fused+x2+longest")
    assert (side.base, side.changes, side.accumulate) == ("peer", ("fused", "longest"), 2)
    for name in ("ours+fused", "theirs", "peer+x3"):
        with pytest.raises(UserError, match="unknown side"):
            peer_sides.Side.parse(name)


@pytest.mark.slow
def test_a_line_a_side_of_the_same_model(manifest, whisper, lm, tmp_path):
    results = tmp_path / "results.jsonl"
    sides = ["ours", "peer", "ours+random+x2", "peer+longest+grouped+fused+x2"]
    command = [sys.executable, BENCH / "peer_step.py", "--encoder", whisper, "--llm", lm]
    command += ["--data", manifest, "--cases", "all", "--rounds", "1", "--seconds", "0"]
    command += ["--utterances", "4", "--sides", *sides]
    env = os.environ | {"DSASR_BENCH_RESULTS": str(results)}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(x) for x in results.read_text().splitlines()]
    assert [x["side"] for x in lines] == sides
    assert len({x["parameters_trained"] for x in lines}) == 1
    for one in lines:
        assert max(one["loss_error"], one["gradient_error"]) < 1e-4
        assert one["ours_over_this"] == pytest.approx(
            lines[0]["audio_s_per_s"] / one["audio_s_per_s"], rel=0.01
        )
        assert 0.3 < one["audio_s_per_step"] / (4 * 1.15) < 1.7
        assert one["steps"] == 2 and one["peak_mb"] > 100
