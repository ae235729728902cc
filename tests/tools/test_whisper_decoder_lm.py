"""Whisper's decoder as a language model: tiny random ones."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    PreTrainedTokenizerFast,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from dsasr.data.text.tokenizers import load_tokenizer
from dsasr.utils.errors import UserError, run_tool

TOOLS = Path(__file__).parents[2] / "tools"
SPECIAL = ("<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|transcribe|>", "<|notimestamps|>")
LETTERS = "Ġabdfgiou"
SHAPE = {
    "vocab_size": len(LETTERS + "?") + len(SPECIAL), "d_model": 16, "encoder_layers": 1,
    "encoder_attention_heads": 2, "encoder_ffn_dim": 8, "decoder_layers": 3,
    "decoder_attention_heads": 4, "decoder_ffn_dim": 40, "max_target_positions": 24,
    "pad_token_id": 10, "bos_token_id": 10, "eos_token_id": 10, "decoder_start_token_id": 11,
}  # fmt: skip


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.syspath_prepend(str(TOOLS))
    monkeypatch.delitem(sys.modules, "whisper_decoder_lm", raising=False)
    import whisper_decoder_lm

    return whisper_decoder_lm


@pytest.fixture
def saved(tmp_path):
    """``saved(constant, **changes)``: (folder, model): a random Whisper whose cross-attention gives
    a vector alone, ``constant`` times a random one."""

    def save(constant: float = 0.0, **changes):
        torch.manual_seed(0)
        model = WhisperForConditionalGeneration(WhisperConfig(**(SHAPE | changes))).eval()
        for parameter in model.parameters():  # no bias 0, no norm the identity
            parameter.data.add_(0.3 * torch.randn_like(parameter))
        for layer in model.model.decoder.layers:
            torch.nn.init.zeros_(layer.encoder_attn.out_proj.weight)
            layer.encoder_attn.out_proj.bias.data.mul_(constant)
        folder = tmp_path / "whisper"
        model.save_pretrained(folder)
        vocabulary = {x: i for i, x in enumerate([*LETTERS, "?"])}
        letters = Tokenizer(models.BPE(vocabulary, [], unk_token="?"))
        letters.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        letters.add_special_tokens(list(SPECIAL))
        fast = PreTrainedTokenizerFast(tokenizer_object=letters, eos_token=SPECIAL[0])
        fast.save_pretrained(folder)
        return folder, model

    return save


@torch.no_grad()
def assert_same_logits(model, lm):
    ids = torch.randint(0, SHAPE["vocab_size"], (2, SHAPE["max_target_positions"]))
    ids[ids == SHAPE["pad_token_id"]] = 0
    speech = torch.zeros(2, 1500, SHAPE["d_model"], dtype=torch.float64)
    frames = model.double().model.decoder(input_ids=ids, encoder_hidden_states=speech)
    expected = model.proj_out(frames.last_hidden_state)
    found = lm.double().eval()(ids, attention_mask=torch.ones_like(ids)).logits
    assert expected.std() > 0.5
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("changes", [{}, {"scale_embedding": True, "activation_function": "relu"}])
def test_it_is_the_decoder_without_cross_attention(tool, saved, tmp_path, changes):
    folder, model = saved(**changes)
    assert tool.main([str(folder), str(tmp_path / "lm")]) == 0
    lm = AutoModelForCausalLM.from_pretrained(tmp_path / "lm")
    assert type(lm).__name__ == "GPT2LMHeadModel"
    assert lm.get_output_embeddings().weight is lm.get_input_embeddings().weight
    assert_same_logits(model, lm)
    ours, theirs = load_tokenizer(tmp_path / "lm"), load_tokenizer(folder)
    assert ours.pieces() == theirs.pieces() and ours.end_id == theirs.end_id == 10


def test_with_speech_a_constant_cross_attention_stays(tool, saved, tiny, tmp_path):
    folder, model = saved(1.0)
    options = ["--speech", str(tiny.parent / "valid"), "--limit", "3"]
    assert tool.main([str(folder), str(tmp_path / "lm"), *options]) == 0
    lm = AutoModelForCausalLM.from_pretrained(tmp_path / "lm")
    ids = torch.arange(9)[None]
    with torch.no_grad():
        speech = torch.zeros(1, 1500, SHAPE["d_model"])
        frames = model.model.decoder(input_ids=ids, encoder_hidden_states=speech)
        expected = model.proj_out(frames.last_hidden_state)
        found = lm.eval()(ids, attention_mask=torch.ones_like(ids)).logits
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_speech_in_a_language_without_a_token_is_refused(tool, saved, tiny, tmp_path):
    folder, _ = saved()
    options = ["--speech", str(tiny.parent / "valid"), "--lang", "xx"]
    with pytest.raises(UserError, match=r"no <\|xx\|>; see --lang"):
        tool.main([str(folder), str(tmp_path / "lm"), *options])


def without_decoder(folder: Path) -> None:
    path = folder / "model.safetensors"
    kept = {k: v for k, v in load_file(path).items() if "encoder." in k}
    save_file({k: v for k, v in kept.items() if "decoder" not in k}, path)


def without_a_tensor(folder: Path) -> None:
    path = folder / "model.safetensors"
    save_file({k: v for k, v in load_file(path).items() if "decoder.layers.1.fc1" not in k}, path)


def setting(**changes):
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def without(name: str):
    return lambda folder: (folder / name).unlink()


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (without("config.json"), "is no Hugging Face folder"),
        (setting(model_type="gpt2"), "is no Whisper: its config.json has gpt2"),
        (without_decoder, "give a whole Whisper, not its encoder"),
        (without_a_tensor, "lacks model.decoder.layers.1.fc1.weight"),
        (setting(max_target_positions=23), r"embed_positions.weight \[24, 16\], not \[23, 16\]"),
        (setting(tie_word_embeddings=False), "output layer of its own"),
        (without("model.safetensors"), "has no safetensors weights"),
        (lambda folder: [p.unlink() for p in folder.glob("token*")], "no tokenizer.json"),
    ],
)
def test_what_is_no_whole_whisper_is_refused(tool, saved, tmp_path, capsys, spoil, says):
    folder, _ = saved()
    spoil(folder)
    arguments = [str(folder), str(tmp_path / "lm")]
    with pytest.raises(UserError, match=says):
        tool.main(arguments)
    assert run_tool(lambda: tool.main(arguments)) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not (tmp_path / "lm").exists()


def test_nothing_is_written_over(tool, saved):
    folder, _ = saved()
    with pytest.raises(UserError, match="is there already"):
        tool.main([str(folder), str(folder)])


@pytest.mark.slow
def test_speech_makes_whisper_base_a_language_model(
    tool, whisper_base, recordings, command, tmp_path
):
    manifest, shards = recordings / "en_read" / "valid.jsonl", tmp_path / "shards"
    assert command("data", "make-shards", manifest, "--out", shards).returncode == 0
    options = ["--speech", str(shards), "--limit", "4"]
    assert tool.main([str(whisper_base), str(tmp_path / "lm"), *options]) == 0
    lm = AutoModelForCausalLM.from_pretrained(tmp_path / "lm").eval()
    tokenizer = load_tokenizer(tmp_path / "lm")
    prompt = tokenizer.parse("".join(SPECIAL[1:]))
    losses = []
    for text in ("i will see you in the morning", "the weather was very nice last week"):
        ids = torch.tensor([[*prompt, *tokenizer.encode(f" {text}")]])
        labels = ids.masked_fill(torch.arange(ids.shape[1]) < len(prompt), -100)
        with torch.no_grad():
            loss = lm(ids, attention_mask=torch.ones_like(ids), labels=labels).loss
        losses.append(float(loss))
    assert max(losses) < 6.5  # without speech: 31 on such text; ln(vocabulary): 10.9
