"""Hugging Face encoders by path: tiny ones with random weights."""

import math

import numpy as np
import pytest
import torch

from dsasr.model.encoders import pretrained
from dsasr.utils.errors import UserError

WAVE = np.random.default_rng(0).normal(0, 0.1, 16000).astype(np.float32)


def whisper(folder):
    from transformers import WhisperConfig, WhisperModel

    WhisperModel(
        WhisperConfig(
            vocab_size=64, d_model=16, encoder_layers=1, decoder_layers=1,
            encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=32,
            decoder_ffn_dim=32, max_source_positions=100, max_target_positions=16,
            pad_token_id=0, bos_token_id=1,
            eos_token_id=2, decoder_start_token_id=1,
        )
    ).save_pretrained(folder)  # fmt: skip


def waves(folder, kind):
    import transformers

    config = getattr(transformers, f"{kind}Config")(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        conv_dim=(8,) * 7, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
    )  # fmt: skip
    getattr(transformers, f"{kind}Model")(config).save_pretrained(folder)


@pytest.mark.parametrize("kind", ["Whisper", "Wav2Vec2", "Hubert"])
def test_frames_of_a_second(tmp_path, kind):
    torch.manual_seed(7)  # not the seed of the baseline's weights
    whisper(tmp_path) if kind == "Whisper" else waves(tmp_path, kind)
    held = pretrained.load(tmp_path)
    frames = held.frames(WAVE)
    assert held.frame_seconds == pytest.approx(0.02)
    assert abs(len(frames) - 50) <= 1 and frames.shape[1] == 16
    assert frames.isfinite().all()
    other = pretrained.load(tmp_path, random=True).frames(WAVE)
    assert other.shape == frames.shape and not torch.equal(other, frames)


def test_whisper_reads_no_more_than_its_window(tmp_path):
    whisper(tmp_path / "whisper")
    waves(tmp_path / "hubert", "Hubert")
    longest = pretrained.longest(tmp_path / "whisper")
    assert longest == pytest.approx(2.0) and pretrained.longest(tmp_path / "hubert") == math.inf
    held = pretrained.load(tmp_path / "whisper")
    wave = np.resize(WAVE, round(longest * pretrained.RATE) + 1)
    assert len(held.frames(wave[:-1])) == 100
    with pytest.raises(UserError, match="2 s at most"):
        held.frames(wave)


@pytest.mark.parametrize("read", [pretrained.load, pretrained.longest])
def test_refusals_name_the_cause(tmp_path, read):
    with pytest.raises(UserError, match="config"):
        read(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UserError, match="bert"):
        read(tmp_path)
