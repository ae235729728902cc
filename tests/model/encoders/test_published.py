"""Shapes of pretrained encoders that are not on this machine."""

from __future__ import annotations

import huggingface_hub
import pytest
import torch

from dsasr.model.encoders.pretrained import PretrainedEncoderConfig
from dsasr.model.encoders.published import PUBLISHED, fresh_encoder, is_published
from dsasr.utils.errors import UserError

# Millions of parameters as their authors give them (of Whisper's encoder: as transformers counts
# them, without the 1500 positions, which are no parameters here).
MILLIONS = {
    "openai/whisper-base": 19.8, "openai/whisper-large-v3": 635.0,
    "facebook/wav2vec2-base": 95, "facebook/wav2vec2-large-lv60": 317,
    "facebook/hubert-base-ls960": 95, "facebook/hubert-large-ll60k": 316,
    "facebook/hubert-xlarge-ll60k": 964, "microsoft/wavlm-base-plus": 94.7,
    "microsoft/wavlm-large": 316.6, "facebook/w2v-bert-2.0": 580,
}  # fmt: skip


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("name", MILLIONS)
def test_sizes_are_the_published_ones(name):
    with torch.device("meta"):
        encoder = fresh_encoder(PretrainedEncoderConfig(name))
    size = sum(p.numel() for p in encoder.parameters()) / 1e6
    assert size == pytest.approx(MILLIONS[name], rel=0.01)


def test_every_name_is_of_a_known_family_and_takes_settings():
    for name in PUBLISHED:
        with torch.device("meta"):
            encoder = fresh_encoder(PretrainedEncoderConfig(name, layers=1))
        assert is_published(name) and len(encoder.blocks) == 1
        assert encoder.frame_seconds == 0.02


def test_a_folder_of_that_name_comes_first(tmp_path, monkeypatch, make):
    make("whisper")
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "openai" / "whisper-base"
    folder.mkdir(parents=True)
    (tmp_path / "config.json").rename(folder / "config.json")
    assert not is_published("openai/whisper-base")
    assert fresh_encoder(PretrainedEncoderConfig("openai/whisper-base")).width == 32


def test_unknown_shapes_are_named_with_what_is_known():
    with pytest.raises(UserError, match=r"someone/else/config\.json.*openai/whisper-large-v3"):
        fresh_encoder(PretrainedEncoderConfig("someone/else"))
