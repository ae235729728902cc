"""Speech enters a language model at the scale of its tokens, wherever the family scales them."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from dsasr.data.batch import Batch
from dsasr.model.adaptors.mlp import MlpAdaptor
from dsasr.model.adaptors.protocol import AdaptorConfig
from dsasr.model.encoders.conformer import Encoder, EncoderConfig
from dsasr.model.llm import LlmConfig, load_llm
from dsasr.model.llm_sharded_load import draw_llm, load_llm_partitioned
from dsasr.model.speech_llm import SpeechLLM
from dsasr.model.token_embeddings import embed_tokens, embedding_rms, input_scale, token_rms
from dsasr.utils.errors import UserError

VOCAB, WIDTH, PREFIX, SUFFIX = 300, 64, [11, 12, 13, 14, 15, 16], [17, 18, 19]
SHAPE = {"vocab_size": VOCAB, "hidden_size": WIDTH, "intermediate_size": 96, "head_dim": 16,
         "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
         "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
POSITIONS = {"n_positions": 256, "n_embd": WIDTH, "n_layer": 2, "n_head": 4}
MAMBA = {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8,
         "mamba_n_groups": 1, "mamba_chunk_size": 16}  # fmt: skip
DECODER = {"d_model": WIDTH, "ffn_dim": 96, "num_layers": 2, "attention_heads": 4}
# family → (its settings, the factor that its embedding layer applies, the one that is left to us)
FAMILIES = {
    "qwen3": ({}, 1, 1),
    "gpt2": (POSITIONS, 1, 1),
    "opt": ({"word_embed_proj_dim": 32, "ffn_dim": 96, "max_position_embeddings": 256}, 1, 1),
    "gemma": ({}, WIDTH**0.5, 1),
    "gemma2": ({}, WIDTH**0.5, 1),
    "gemma3_text": ({}, WIDTH**0.5, 1),
    "recurrent_gemma": ({"lru_width": WIDTH, "attention_window_size": 256}, 1, 1),
    "granite": ({"embedding_multiplier": 12.0}, 1, 1),
    "minicpm3": ({"scale_emb": 12, "dim_model_base": WIDTH, "q_lora_rank": 16, "kv_lora_rank": 16,
                  "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 16,
                  "head_dim": 8, "num_key_value_heads": 4}, 12, 1),
    "falcon_h1": ({"embedding_multiplier": 5.5, "lm_head_multiplier": 1.0, **MAMBA}, 1, 5.5),
    "xglm": (DECODER | {"scale_embedding": True, "max_position_embeddings": 256}, WIDTH**0.5, 1),
}  # fmt: skip


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    """(name, folder of a tiny random model, its embedding layer's factor, the factor left)."""
    settings, inside, left = FAMILIES[request.param]
    config = AutoConfig.for_model(request.param, **{**SHAPE, **settings})
    torch.manual_seed(0)
    llm = AutoModelForCausalLM.from_config(config)
    folder = tmp_path_factory.mktemp(request.param)
    llm.save_pretrained(folder)
    return request.param, folder, inside, left


def rms(tensor):
    return float(tensor.detach().float().square().mean().sqrt())


def speech_llm(llm, scale):
    torch.manual_seed(1)
    encoder = Encoder(EncoderConfig(width=32, layers=1, heads=2, ffn=32, kernel=3, mels=16))
    width = llm.get_input_embeddings().weight.shape[1]
    adaptor = MlpAdaptor(AdaptorConfig(hidden=128), 32, width, scale)
    return SpeechLLM(encoder, adaptor, llm, PREFIX, SUFFIX, 0, LlmConfig()).eval()


def batch():
    generator = torch.Generator().manual_seed(2)
    features = torch.randn(1, 800, 16, generator=generator)
    tokens = torch.randint(20, VOCAB, (1, 60), generator=generator)
    return Batch.blank(
        features, feature_lengths_B=torch.tensor([800]), tokens_BU=tokens,
        token_lengths_B=torch.tensor([60]), keys=("a",),
    )  # fmt: skip


def residual_streams(model):
    """(speech, text) [N, D] that enter the first layer, in one forward pass."""
    found = []
    layers = [m for m in model.llm.base_model.modules() if type(m).__name__.endswith("Layer")]
    layers += [m[0] for m in model.llm.base_model.modules() if isinstance(m, torch.nn.ModuleList)]
    handles = [
        layer.register_forward_pre_hook(
            lambda _, args, kwargs: found.append(args[0] if args else kwargs["hidden_states"]),
            with_kwargs=True,
        )
        for layer in layers
    ]
    with torch.no_grad():
        model(batch())
    for handle in handles:
        handle.remove()
    stream = found[0][0]
    frames_B = model.encoder.output_lengths(torch.tensor([800]))
    first, count = len(PREFIX), int(model.adaptor.output_lengths(frames_B))
    return stream[first : first + count], torch.cat((stream[:first], stream[first + count :]))


def test_speech_and_tokens_enter_the_first_layer_at_one_scale(family):
    _, folder, _, _ = family
    llm = load_llm(folder, attn="eager")
    speech, text = residual_streams(speech_llm(llm, token_rms(llm)))
    assert len(speech) > 40 and len(text) > 40
    assert rms(speech) == pytest.approx(rms(text), rel=0.2)


def test_every_way_of_loading_measures_the_same_scale(family):
    _, folder, inside, left = family
    llm = load_llm(folder, attn="eager")
    weight = llm.get_input_embeddings().weight
    assert token_rms(llm) == pytest.approx(rms(weight) * inside * left, rel=1e-3)
    assert input_scale(llm) == pytest.approx(left, rel=1e-6)
    assert (left == 1) == (input_scale(llm) == 1)  # exactly
    options = {"attn": "eager", "dropout": 0.0}
    sharded, scale = load_llm_partitioned(folder, lambda parameters: None, **options)
    assert scale == pytest.approx(token_rms(llm), rel=1e-6)
    assert torch.equal(sharded.get_input_embeddings().weight, weight)
    drawn, scale = draw_llm(folder, 3, None, **options)
    assert scale == pytest.approx(token_rms(drawn), rel=1e-6)


def test_logits_from_embeddings_are_those_from_ids(family):
    _, folder, _, _ = family
    ids = torch.arange(20, 32)[None]
    with torch.no_grad():
        expected = load_llm(folder, attn="eager").eval()(ids, use_cache=False).logits
        model = speech_llm(load_llm(folder, attn="eager"), 1.0)
        embeds = model.embed_tokens(ids)
        hidden = model.llm.base_model(inputs_embeds=embeds, use_cache=False)[0]
        logits = model.head.cap(model.head(hidden))
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


def test_measuring_leaves_the_model_as_it_was(family):
    _, folder, _, _ = family
    llm = load_llm(folder, attn="eager").train()
    before = {name: (id(p), p.clone()) for name, p in llm.named_parameters()}
    state = torch.get_rng_state()
    input_scale(llm)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(m.training for m in llm.modules())
    for name, parameter in llm.named_parameters():
        assert id(parameter) == before[name][0] and torch.equal(parameter, before[name][1])


def test_a_partitioned_model_is_measured_by_its_structure(family):
    """Under ZeRO-3 a rank's parameters are empty but for their ``ds_shape``."""
    _, folder, _, left = family
    llm = load_llm(folder, attn="eager")
    for parameter in llm.parameters():
        parameter.ds_shape = parameter.shape
        parameter.data = torch.empty(0)
    assert input_scale(llm) == pytest.approx(left, rel=1e-6)


def test_rms_over_the_vocabulary_in_blocks(monkeypatch):
    layer = torch.nn.Embedding(1001, 7)
    whole = embedding_rms(layer)
    assert whole == float(layer.weight.detach().square().mean().sqrt())
    monkeypatch.setattr("dsasr.model.token_embeddings._BLOCK", 100)
    assert embedding_rms(layer) == pytest.approx(whole, rel=1e-6)


def test_a_model_that_needs_the_ids_is_refused():
    """Gemma 3n looks up further embeddings in each layer."""
    config = AutoConfig.for_model(
        "gemma3n_text", **SHAPE, vocab_size_per_layer_input=VOCAB, hidden_size_per_layer_input=8,
        laurel_rank=4, layer_types=["full_attention"] * 2, num_kv_shared_layers=0,
        activation_sparsity_pattern=[0.0, 0.0],
    )  # fmt: skip
    with pytest.raises(UserError, match="more from token ids") as caught:
        input_scale(AutoModelForCausalLM.from_config(config))
    assert "\n" not in str(caught.value)


def test_tokens_are_embedded_as_they_enter(family):
    _, folder, inside, left = family
    llm = load_llm(folder, attn="eager")
    expected = llm.get_input_embeddings().weight[[5, 7, 5]].float() * inside * left
    torch.testing.assert_close(embed_tokens(llm, [5, 7, 5]), expected, rtol=1e-4, atol=1e-6)


def test_on_the_meta_device_the_scale_counts_as_one():
    shape = {"vocab_size": 11, "n_positions": 8, "n_embd": 8, "n_layer": 1, "n_head": 2}
    # A model without buffers, of which the shapes alone are wanted.
    with torch.device("meta"):
        llm = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", **shape))
        assert input_scale(llm) == 1.0
