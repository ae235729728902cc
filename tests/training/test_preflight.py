"""Bad input around a pretrained encoder: one line, from the check before training."""

from __future__ import annotations

import json
import shutil
import struct
from collections import Counter
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import AutoConfig, AutoModel, PreTrainedTokenizerFast

from dsasr import recipe
from dsasr.build import Builder
from dsasr.data.shards.build_index import build_index
from dsasr.model.encoders.pretrained import PREPROCESSOR
from dsasr.training.preflight import check, llm_lines
from dsasr.utils.errors import UserError

# Reads 0.8 s at most: three of the tiny corpus' words, but not four.
SHAPE = {"d_model": 16, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 32,
         "decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 8, "vocab_size": 50,
         "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
         "max_source_positions": 40}  # fmt: skip


@pytest.fixture
def whisper(tmp_path) -> Path:
    folder = tmp_path / "whisper"
    AutoModel.from_config(AutoConfig.for_model("whisper", **SHAPE)).save_pretrained(folder)
    settings = {"feature_size": 80, "sampling_rate": 16000}
    (folder / PREPROCESSOR).write_text(json.dumps(settings))
    return folder


def load(tiny: Path, encoder: object, *overrides: str) -> recipe.Recipe:
    return recipe.load(
        str(tiny),
        [
            f"model.encoder={{path: {encoder}}}", "data.cmvn=''", "model.adaptor.stack=8",
            "model.pretrain.chunks=null", "data.dataloader.batch.max_seconds=0.8", *overrides,
        ],
    )  # fmt: skip


def refusal(cfg: recipe.Recipe) -> str:
    with pytest.raises(UserError) as caught:
        check(Builder(cfg))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_fits_passes(tiny, whisper):
    check(Builder(load(tiny, whisper)))


def test_a_folder_without_weights(tiny, whisper):
    (whisper / "model.safetensors").unlink()
    assert "has no safetensors weights: copy or download" in refusal(load(tiny, whisper))
    check(Builder(load(tiny, whisper, "model.encoder.weights=false")))
    torch.save({}, whisper / "pytorch_model.bin")
    message = refusal(load(tiny, whisper))
    assert "only a pickle" in message and "save_pretrained" in message


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"feature_size": 128}, "has 128 features, the encoder of config.json reads 80"),
        ({"sampling_rate": 8000}, "has a sampling_rate of 8000 Hz: only encoders of 16000 Hz"),
        ([1], "holds no settings"),
    ],
)
def test_features_that_are_not_the_encoders(tiny, whisper, settings, says):
    (whisper / PREPROCESSOR).write_text(json.dumps(settings))
    message = refusal(load(tiny, whisper))
    assert says in message and PREPROCESSOR in message


def test_damaged_settings(tiny, whisper):
    (whisper / PREPROCESSOR).write_text("{")
    assert "cannot be read" in refusal(load(tiny, whisper))
    (whisper / PREPROCESSOR).unlink()
    check(Builder(load(tiny, whisper)))
    (whisper / "config.json").write_text("{}")
    message = refusal(load(tiny, whisper))
    assert "config.json is of type 'none', no known encoder: use one of" in message
    (whisper / "config.json").write_text('{"model_type": "firered_asr"}')
    message = refusal(load(tiny, whisper))
    assert "is of type 'firered_asr'" in message and message.endswith("wavlm, whisper")


def test_features_that_a_pretrained_encoder_does_not_read(tiny, whisper):
    with pytest.raises(UserError, match=r"data\.fbank has no effect on a pretrained encoder"):
        load(tiny, whisper, "data.fbank.mels=128")


def test_a_tokenizer_of_another_model(tiny, whisper, tmp_path):
    """Such as Whisper's, whose 51,865 tokens the language model has no embeddings for."""
    vocabulary = {f"t{i}": i for i in range(2000)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="t0"))
    tokens = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="t1", unk_token="t0")
    tokens.save_pretrained(tmp_path / "tokenizer")
    message = refusal(load(tiny, whisper, f"model.tokenizer={tmp_path / 'tokenizer'}"))
    assert "has 2000 tokens, the language model only" in message
    assert "use the tokenizer folder that came with the model" in message


def test_chunks_of_an_encoder_that_sees_all(tiny, whisper):
    for branch in ("pretrain", "sft"):
        message = refusal(load(tiny, whisper, f"model.{branch}.chunks={{}}"))
        assert f"model.{branch}.chunks" in message and "whole utterances only" in message

    message = refusal(load(tiny, whisper, "evaluation.decode.chunk_ms=640"))
    assert "evaluation.decode.chunk_ms=0" in message and "whole utterances only" in message


def test_padding_beyond_the_encoders_positions(tiny, whisper):
    encoder = f"model.encoder={{path: {whisper}, pad_to: 2}}"
    message = refusal(load(tiny, whisper, encoder))
    assert "reads 0.8 s at most; give model.encoder.pad_to=0.8" in message


def test_an_embedding_of_too_much_speech(tiny, whisper):
    message = refusal(load(tiny, whisper, "model.adaptor.stack=24"))
    assert "50 frames a second" in message and "one embedding for 0.48 s" in message
    assert message.endswith("give model.adaptor.stack=8")


def test_text_and_confusions_that_cannot_be_read(tiny, tmp_path):
    text, confusions = tmp_path / "text.jsonl", tmp_path / "confusions.json"
    confusions.write_text("{}")
    stage = "{name: read, branch: sft, trains: {adaptor: 1.0e-3}, steps: 2, text_share: 1.0}"
    head = "{name: head, branch: pretrain, trains: {ctc: 1.0e-3}, steps: 2}"
    asked = [f"stages=[{head}, {stage}]", "model.adaptor={kind: ctc}",
             "data.phonemizer.kind=characters"]  # fmt: skip

    def told(content: str, extra: str = "") -> str:
        text.write_text(content)
        only = f"data.text_only={{path: {text}, lang: en{extra}}}"
        return refusal(recipe.load(str(tiny), [*asked, only]))

    assert "text.jsonl:2: not a JSON object" in told('{"text": "a"}\n{"text": 5}\n')
    assert "no sentence of a usable length" in told("\n")
    assert "is no such file" in told('{"text": "a"}\n', f", confusions: {confusions}")


def test_a_hub_name_without_a_network(tiny, monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    message = refusal(load(tiny, "openai/whisper-large-v3"))
    assert message.startswith("model.encoder.path") and "give a local folder" in message
    assert "hf download openai/whisper-large-v3" in message


def test_longer_audio_than_the_encoder_reads(tiny, whisper):
    limit = "give data.dataloader.batch.max_seconds=0.8"
    message = refusal(load(tiny, whisper, "data.dataloader.batch.max_seconds=40"))
    assert "reads 0.8 s at most" in message and limit in message and "too_long" in message
    message = refusal(load(tiny, whisper, "stages.joint.batch={frames: 400, max_seconds: 2}"))
    assert "stages.joint.batch.max_seconds=2" in message
    # Within the limit, what is longer is dropped, counted and named.
    cfg = load(tiny, whisper)
    shards = sorted((tiny.parent / "train").glob("*.tar"))
    longer = {e.key for shard in shards for e in build_index(str(shard)) if e.duration > 0.8}
    dropped = Counter()
    with Builder(cfg).train_dataloader(cfg.stage("align"), None) as stream:
        while (batch := next(stream)).epoch == 0:
            for cause, _, key, detail in batch.bad:
                assert cause == "too_long" and "at most 0.8 s" in detail
                dropped[key] += 1
    assert longer and set(dropped) >= longer


@pytest.fixture
def llm(tiny, tmp_path) -> Path:
    """A copy of the tiny language model's folder."""
    return Path(shutil.copytree(tiny.parent / "lm", tmp_path / "lm"))


def refusal_of_llm(tiny: Path, folder: Path, *overrides: str) -> str:
    return refusal(recipe.load(str(tiny), [f"model.llm.path={folder}", *overrides]))


def test_a_language_model_without_its_weights(tiny, llm):
    check(Builder(recipe.load(str(tiny), [f"model.llm.path={llm}"])))
    weights = llm / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    assert "model.safetensors cannot be read" in refusal_of_llm(tiny, llm)
    weights.write_bytes(struct.pack("<Q", 1 << 62) + whole[8:])
    assert "model.safetensors cannot be read" in refusal_of_llm(tiny, llm)
    weights.unlink()
    assert "has no safetensors weights: copy or download" in refusal_of_llm(tiny, llm)
    check(Builder(recipe.load(str(tiny), [f"model.llm.path={llm}", "model.llm.weights=false"])))
    check(Builder(recipe.load(str(tiny), [f"model.llm.path={llm}", "branch=pretrain"])))


def test_a_language_model_of_other_weights(tiny, llm):
    weights = load_file(llm / "model.safetensors")
    norm = "model.layers.0.input_layernorm.weight"
    kept = {name: tensor for name, tensor in weights.items() if name != norm}
    save_file(kept, llm / "model.safetensors")
    assert f"lacks {norm}: its weights are not those" in refusal_of_llm(tiny, llm)
    save_file(kept | {norm: torch.ones(24)}, llm / "model.safetensors")
    assert f"has {norm} [24], not [16]" in refusal_of_llm(tiny, llm)
    save_file(weights, llm / "model.safetensors")
    values = json.loads((llm / "config.json").read_text())
    (llm / "config.json").write_text(json.dumps(values | {"intermediate_size": 48}))
    assert "its weights are not those of its config.json" in refusal_of_llm(tiny, llm)


def test_folders_that_cannot_be_written(tiny, tmp_path):
    (tmp_path / "file").write_text("")
    for key, *more in (
        ["run"], ["store.path"], ["engine.offload.path", "engine.offload.device=disk"],
        ["data.dataloader.source.cache", "data.dataloader.source.cache_gb=1"],
    ):  # fmt: skip
        cfg = recipe.load(str(tiny), [f"{key}={tmp_path}/file/x", *more])
        assert refusal(cfg).startswith(f"{key}: {tmp_path}/file/x")
    check(Builder(recipe.load(str(tiny), [f"run={tmp_path}/a/b/c"])))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file"]


def test_cmvn_of_other_features(tiny):
    message = refusal(recipe.load(str(tiny), ["data.fbank.mels=40", "model.encoder.mels=40"]))
    assert "has 80 mel bins, model.encoder.mels is 40" in message


def test_shards_that_are_not_there(tiny, whisper):
    message = refusal(load(tiny, whisper, "data.train.tiny.shards=/nowhere/shards"))
    assert message.startswith("data.train.tiny.shards") and "dsasr data make-shards" in message


def replace_llm(folder: Path, family: str, **settings: object) -> None:
    """Give the folder's language model another family; its tokenizer stays."""
    vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"]
    config = AutoConfig.for_model(family, **{"vocab_size": vocabulary, **settings})
    config.save_pretrained(folder)


SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3,
         "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}  # fmt: skip
MAMBA = {"hidden_size": 16, "state_size": 8, "num_hidden_layers": 3, "num_heads": 4, "head_dim": 8,
         "n_groups": 1, "chunk_size": 16}  # fmt: skip
DRAWN = "model.llm.weights=false"


def test_a_language_model_is_built_as_training_builds_it(tiny, llm):
    """The attention, the head, recomputed layers, LoRA by peft: before any stage."""
    replace_llm(llm, "bloom", hidden_size=16, n_layer=3, n_head=2)
    assert "give model.llm.attn=eager" in refusal_of_llm(tiny, llm, DRAWN)
    eager = [f"model.llm.path={llm}", DRAWN, "model.llm.attn=eager"]
    check(Builder(recipe.load(str(tiny), eager)))
    replace_llm(llm, "cohere", **SMALL)
    assert "cohere scales its logits by 0.0625" in refusal_of_llm(tiny, llm, DRAWN)
    replace_llm(llm, "mamba2", **MAMBA)
    check(Builder(recipe.load(str(tiny), eager)))
    trains = "trains={adaptor: 1e-3, lora: 1e-3}"
    adapted = [f"stages.ia_sft.{trains}", f"stages.joint.{trains}", "model.lora={}"]
    refused = refusal_of_llm(tiny, llm, *eager[1:], *adapted)
    assert refused.startswith("model.lora: peft refuses this model") and "out_proj" in refused


def test_what_a_run_would_lose_is_told_beforehand(tiny, llm):
    replace_llm(llm, "mamba2", **MAMBA)
    settings = [f"model.llm.path={llm}", DRAWN, "model.llm.attn=eager", "model.llm.pack=64"]
    builder = Builder(recipe.load(str(tiny), settings))
    lines = [line for line in llm_lines(builder) if "model.llm.pack is off" in line]
    assert len(lines) == 1 and "mamba2 with eager attention" in lines[0]
    model = builder.speech_llm()
    assert model.cfg.pack == 0 and model.cached
