"""What families of language models do with embeddings, found by trying them."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from dsasr.model import llm_properties
from dsasr.model.llm import LlmConfig, read_llm_config
from dsasr.model.llm_forward import Continuation, packed_hidden
from dsasr.model.llm_properties import LlmProperties, check_special_tokens, small_config, try_llm
from dsasr.utils.errors import UserError

SHAPE = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4, "pad_token_id": 0, "bos_token_id": 1,
         "eos_token_id": 2}  # fmt: skip
QWEN = SHAPE | {"num_key_value_heads": 2, "head_dim": 8}
MAMBA2 = {"vocab_size": 64, "hidden_size": 32, "state_size": 8, "num_hidden_layers": 2,
          "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 16}  # fmt: skip
HYBRID = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8,
          "mamba_n_groups": 1, "mamba_chunk_size": 16, "head_dim": 8,
          "num_key_value_heads": 2}  # fmt: skip


def config(family: str, **settings):
    return AutoConfig.for_model(family, **settings)


@pytest.mark.parametrize(
    "family, settings, attn, packs, caches",
    [
        ("qwen3", QWEN, "sdpa", True, True),
        ("qwen3", QWEN, "eager", True, True),
        ("gemma2", SHAPE | {"head_dim": 8, "sliding_window": 4}, "eager", True, True),
        ("opt", SHAPE | {"ffn_dim": 48, "word_embed_proj_dim": 32}, "sdpa", True, True),
        ("opt", SHAPE | {"ffn_dim": 48, "word_embed_proj_dim": 32}, "eager", False, True),
        ("mpt", {"vocab_size": 64, "d_model": 32, "n_heads": 4, "n_layers": 2}, "eager", False,
         True),
        ("ctrl", {"vocab_size": 64, "n_embd": 32, "dff": 48, "n_layer": 2, "n_head": 4}, "eager",
         True, True),
        ("mamba2", MAMBA2, "eager", False, True),
        ("mamba", {"vocab_size": 64, "hidden_size": 32, "state_size": 8}, "eager", False, False),
    ],
)  # fmt: skip
def test_packing_and_cache_as_they_are_tried(family, settings, attn, packs, caches):
    state = torch.get_rng_state()
    assert try_llm(config(family, **settings), attn) == LlmProperties(packs, caches)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "family, settings, message",
    [
        ("falcon_h1", SHAPE | HYBRID | {"lm_head_multiplier": 0.5}, "scales its logits by 0.5"),
        ("cohere", SHAPE | {"logit_scale": 0.25}, "scales its logits by 0.25"),
        ("modernbert-decoder", SHAPE | {"layer_types": ["full_attention"] * 2}, "W·h"),
        ("bert", SHAPE | {"is_decoder": True}, "W·h"),
        ("bert", SHAPE, "sees later positions"),
        ("bloom", {"vocab_size": 64, "hidden_size": 32, "n_layer": 2, "n_head": 4},
         "model.llm.attn=eager"),
    ],
)  # fmt: skip
def test_models_that_speech_cannot_go_into_are_refused_by_name(family, settings, message):
    with pytest.raises(UserError, match=message) as caught:
        try_llm(config(family, **settings), "sdpa")
    assert family in str(caught.value) and "\n" not in str(caught.value)


def test_an_encoder_decoder_is_no_language_model(tmp_path):
    config("whisper").save_pretrained(tmp_path)
    with pytest.raises(
        UserError, match=r"encoder-decoder \(whisper\).*whisper_decoder_lm"
    ) as caught:
        read_llm_config(tmp_path)
    assert "\n" not in str(caught.value)


def test_the_soft_cap_of_the_config_is_the_models(monkeypatch):
    gemma = config("gemma2", **SHAPE, head_dim=8, final_logit_softcapping=5.0)
    try_llm(gemma, "eager")
    monkeypatch.setattr(llm_properties, "read_soft_cap", lambda config: None)
    with pytest.raises(UserError, match="gemma2 has logits"):
        try_llm(gemma, "eager")


def test_the_small_copy_has_a_layer_of_each_kind_and_leaves_the_config_alone():
    kinds = ["linear_attention"] * 3 + ["full_attention"]
    large = config(
        "qwen3_next", num_hidden_layers=48, layer_types=kinds * 12, eos_token_id=151_645
    )  # fmt: skip
    small = small_config(large)
    assert small.layer_types == ["linear_attention", "full_attention"]
    assert small.num_hidden_layers == 2 and small.vocab_size == 64 and small.num_experts == 4
    assert large.num_hidden_layers == 48 and len(large.layer_types) == 48
    assert small.hidden_size == large.hidden_size and small.eos_token_id == 63
    assert small_config(config("qwen3", num_hidden_layers=1)).num_hidden_layers == 1


def test_what_a_run_loses_is_said_in_a_line():
    cfg = LlmConfig(pack=512)
    assert LlmProperties().notes("qwen3", cfg) == [] and LlmProperties().applied(cfg) is cfg
    found = LlmProperties(packs=False, caches=False)
    packing, cache = found.notes("mamba", cfg)
    assert "model.llm.pack is off" in packing and "whole sequences" in cache
    assert found.applied(cfg).pack == 0
    assert len(found.notes("mamba", LlmConfig())) == 1


@pytest.mark.parametrize("cached", [True, False])
def test_a_continuation_is_the_model_over_the_whole_sequence(cached):
    """Rows that are repeated, reordered and left out, of sequences of different lengths."""
    torch.manual_seed(0)
    llm = AutoModelForCausalLM.from_config(config("qwen3", **QWEN)).double().eval()
    sequences = [torch.randn(n, 32, dtype=torch.float64) for n in (3, 5)]
    embeds = torch.zeros(2, 5, 32, dtype=torch.float64)
    embeds[0, 2:], embeds[1] = sequences
    with torch.no_grad():
        continuation = Continuation(llm, cached)
        found = continuation.start(embeds, torch.tensor([3, 5]))
        for rows in ([1, 0, 1], [2, 1], [0], [0]):
            last = [packed_hidden(llm, x[None], None)[0, -1] for x in sequences]
            torch.testing.assert_close(found, torch.stack(last), atol=1e-9, rtol=0)
            new = torch.randn(len(rows), 32, dtype=torch.float64)
            sequences = [torch.cat((sequences[r], x[None])) for r, x in zip(rows, new, strict=True)]
            found = continuation.step(new, rows)


class Tokens:
    end_id, pad_id, bos_ids = 2, 0, (1,)


def test_special_tokens_have_embeddings_and_the_models_beginning():
    llm = config("qwen3", **SHAPE)
    assert check_special_tokens(Tokens, llm) == []
    llm.bos_token_id = 5
    [line] = check_special_tokens(Tokens, llm)
    assert "token 1" in line and "says 5" in line
    llm.vocab_size = 2
    with pytest.raises(UserError, match="end token is 2"):
        check_special_tokens(Tokens, llm)
