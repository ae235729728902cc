"""Tiny random models of every family, as folders and as encoders."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModel

from dsasr.model.encoders.pretrained import PretrainedEncoderConfig, build_encoder

WAVES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
         "intermediate_size": 48, "num_conv_pos_embedding_groups": 2,
         "conv_dim": [16] * 4, "conv_kernel": [10, 3, 3, 2], "conv_stride": [5, 2, 2, 2],
         "num_feat_extract_layers": 4, "num_conv_pos_embeddings": 9,
         "vocab_size": 9}  # fmt: skip
STABLE = {"feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True}
TOWER = {"d_model": 32, "encoder_layers": 3, "encoder_attention_heads": 4, "encoder_ffn_dim": 48,
         "num_mel_bins": 80}  # fmt: skip
TINY = {
    "whisper": TOWER | {"decoder_layers": 1, "decoder_attention_heads": 4, "decoder_ffn_dim": 8,
                        "vocab_size": 50, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
                        "decoder_start_token_id": 1},
    "qwen2_audio_encoder": TOWER,
    "voxtral_encoder": {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
                        "intermediate_size": 48, "num_mel_bins": 80},
    "qwen3_asr_encoder": TOWER | {"n_window": 50, "n_window_infer": 100, "output_dim": 32,
                                  "downsample_hidden_size": 8},
    "wav2vec2": WAVES,
    "hubert": WAVES | STABLE,
    "wavlm": WAVES | {"num_buckets": 20, "max_bucket_distance": 40},
    "unispeech": WAVES,
    "unispeech-sat": WAVES,
    "data2vec-audio": WAVES | {"num_conv_pos_embeddings": 3, "conv_pos_kernel_size": 5},
    "wav2vec2-bert": {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
                      "intermediate_size": 48, "conv_depthwise_kernel_size": 5, "vocab_size": 9,
                      "left_max_position_embeddings": 6, "right_max_position_embeddings": 3},
    "parakeet_encoder": {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
                         "intermediate_size": 48, "subsampling_conv_channels": 8,
                         "conv_kernel_size": 5, "num_mel_bins": 80},
}  # fmt: skip


def pytest_generate_tests(metafunc):
    marked = [mark.args[0] for mark in metafunc.definition.iter_markers("parametrize")]
    if "family" in metafunc.fixturenames and not any("family" in names for names in marked):
        metafunc.parametrize("family", list(TINY))


def _shaken(module: torch.nn.Module) -> torch.nn.Module:
    """No layer is the identity, no bias 0."""
    torch.manual_seed(1)
    for parameter in module.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    return module


@pytest.fixture
def make(tmp_path):
    """``make(family, **options)``: an encoder with random weights, from a folder's config.json."""

    def build(family: str, **options):
        AutoConfig.for_model(family, **TINY[family]).save_pretrained(tmp_path)
        torch.manual_seed(0)
        encoder = build_encoder(tmp_path, PretrainedEncoderConfig(str(tmp_path), **options))
        _shaken(encoder.model)
        return encoder

    return build


@pytest.fixture
def saved(tmp_path):
    """``saved(family, cls=AutoModel, **changes)``: (folder with weights, the model in it)."""

    def save(family: str, cls=AutoModel, **changes):
        torch.manual_seed(0)
        model = _shaken(cls.from_config(AutoConfig.for_model(family, **(TINY[family] | changes))))
        model.save_pretrained(tmp_path)
        return tmp_path, model.eval()

    return save
