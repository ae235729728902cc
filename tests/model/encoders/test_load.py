"""Weights of pretrained encoders, from folders as transformers writes them."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCTC, AutoModelForSpeechSeq2Seq

from dsasr.model.encoders.load import check_weights, load_encoder
from dsasr.model.encoders.pretrained import (
    PREPROCESSOR,
    PROCESSOR,
    PretrainedEncoderConfig,
    build_encoder,
    check_preprocessor,
)
from dsasr.utils.errors import UserError


def encoded(encoder, seed=0):
    length = 4000 if encoder.front_end.kind == "wave" else 120
    rows = torch.randn(1, length, encoder.bins, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return encoder.eval()(rows, torch.tensor([length])).frames_BSE[0], rows


def test_every_tensor_is_the_folders(family, saved):
    folder, model = saved(family)
    encoder = load_encoder(folder, PretrainedEncoderConfig(str(folder)))
    stored = {k: v for k, v in model.state_dict().items() if "decoder" not in k}
    loaded = encoder.model.state_dict()
    same = [
        k
        for k in loaded
        if any(n.endswith(k) and torch.equal(v, loaded[k]) for n, v in stored.items())
    ]
    folded = {k for k in loaded if k.endswith("pos_conv_embed.conv.weight")}
    assert set(loaded) - set(same) <= folded
    assert all(x.device.type == "cpu" for x in [*encoder.parameters(), *encoder.buffers()])


@pytest.mark.parametrize("family", ["wav2vec2", "hubert", "wavlm", "unispeech-sat"])
def test_weight_norm_is_folded_into_one_weight(family, saved):
    folder, model = saved(family)
    encoder = load_encoder(folder, PretrainedEncoderConfig(str(folder)))
    frames, rows = encoded(encoder)
    with torch.no_grad():
        expected = model(rows[..., 0]).last_hidden_state[0]
    torch.testing.assert_close(frames, expected, atol=2e-5, rtol=1e-4)
    # Files of older versions name the halves otherwise.
    path = folder / "model.safetensors"
    tensors = load_file(path)
    old = {
        "parametrizations.weight.original0": "weight_g",
        "parametrizations.weight.original1": "weight_v",
    }
    renamed = {}
    for name, tensor in tensors.items():
        for new, legacy in old.items():
            name = name.replace(new, legacy)
        renamed[name] = tensor
    assert set(renamed) != set(tensors)
    save_file(renamed, path, metadata={"format": "pt"})
    again = load_encoder(folder, PretrainedEncoderConfig(str(folder)))
    assert torch.equal(encoded(again)[0], frames)


@pytest.mark.parametrize(
    "family,cls",
    [
        ("whisper", AutoModelForSpeechSeq2Seq),
        ("wav2vec2", AutoModelForCTC),
        ("wav2vec2-bert", AutoModelForCTC),
    ],
)
def test_the_encoder_is_found_inside_a_larger_model(family, cls, saved):
    folder, model = saved(family, cls)
    encoder = load_encoder(folder, PretrainedEncoderConfig(str(folder)))
    inner = model.model.encoder if family == "whisper" else model.base_model
    for name, tensor in inner.state_dict().items():
        loaded = encoder.model.state_dict()
        if name in loaded:
            assert torch.equal(loaded[name], tensor), name


def test_blocks_that_are_dropped_are_not_asked_for(saved):
    folder, _ = saved("whisper")
    encoder = load_encoder(folder, PretrainedEncoderConfig(str(folder), layers=1, layer_sum=True))
    assert len(encoder.blocks) == 1 and not encoder.layer_weights.any()


def test_slices_and_the_whole_are_the_same(family, saved):
    folder, _ = saved(family)
    cfg, seen = PretrainedEncoderConfig(str(folder)), []
    whole = load_encoder(folder, cfg)
    sliced = load_encoder(folder, cfg, partition=seen.append)
    assert len(seen) > 3 and max(map(len, seen)) <= 4
    for (name, a), b in zip(whole.named_parameters(), sliced.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_random_weights_come_from_the_seed(family, saved):
    folder, _ = saved(family)
    cfg = PretrainedEncoderConfig(str(folder), weights=False)
    state = torch.random.get_rng_state()
    first, again, other = (load_encoder(folder, cfg, seed=s) for s in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), state)
    frames = [encoded(e)[0] for e in (first, again, other)]
    assert torch.equal(frames[0], frames[1]) and not torch.equal(frames[0], frames[2])
    assert all(f.isfinite().all() for f in frames)


def test_what_does_not_fit_is_a_users_error(saved):
    folder, _ = saved("whisper", AutoModelForSpeechSeq2Seq)
    cfg, path = PretrainedEncoderConfig(str(folder)), folder / "model.safetensors"
    tensors = load_file(path)
    some = next(n for n in tensors if n.endswith("encoder.layers.1.fc1.weight"))
    save_file({k: v for k, v in tensors.items() if k != some}, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks layers\.1\.fc1\.weight"):
        load_encoder(folder, cfg)
    save_file(tensors | {some: torch.zeros(3, 3)}, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"\[3, 3\], not \[48, 32\]"):
        load_encoder(folder, cfg)
    save_file({"other": torch.zeros(1)}, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match="no weights of its encoder"):
        load_encoder(folder, cfg)
    path.unlink()
    with pytest.raises(UserError, match="copy or download"):
        load_encoder(folder, cfg)
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="pickle"):
        load_encoder(folder, cfg)


def test_weights_are_checked_without_memory_for_them(saved):
    folder, _ = saved("hubert")
    with torch.device("meta"):
        encoder = build_encoder(folder, PretrainedEncoderConfig(str(folder)))
    check_weights(folder, encoder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="no safetensors"):
        check_weights(folder, encoder)


# A folder's own feature extractor, and what it must not be.
EXTRACTORS = {
    "whisper": ({"feature_size": 80}, {"feature_size": 128}),
    "wavlm": ({"feature_size": 1, "do_normalize": False}, {"sampling_rate": 8000}),
    "wav2vec2-bert": ({"feature_size": 80, "stride": 2}, {"feature_size": 128, "stride": 2}),
    "parakeet_encoder": ({"feature_size": 80}, {"feature_size": 128}),
}


@pytest.mark.parametrize("family", EXTRACTORS)
def test_features_are_those_of_the_folders_extractor(family, make, tmp_path):
    fits, wrong = EXTRACTORS[family]
    path = tmp_path / PREPROCESSOR
    front_end = make(family).front_end
    path.write_text(json.dumps({"sampling_rate": 16000} | fits))
    check_preprocessor(tmp_path, front_end)
    path.write_text(json.dumps(wrong))
    with pytest.raises(UserError, match=r"preprocessor_config\.json has"):
        check_preprocessor(tmp_path, front_end)


def test_waves_are_normalized_where_the_folder_says_so(make, tmp_path):
    assert make("wavlm").front_end.normalize
    for value in (False, True):
        (tmp_path / PREPROCESSOR).write_text(json.dumps({"do_normalize": value}))
        assert make("wavlm").front_end.normalize is value


def test_a_processors_file_has_the_extractors_settings(make, tmp_path):
    """transformers 5 writes no other: `Wav2Vec2Processor.save_pretrained`."""
    processor = tmp_path / PROCESSOR
    for value in (False, True):
        processor.write_text(json.dumps({"feature_extractor": {"do_normalize": value}}))
        assert make("wavlm").front_end.normalize is value
    processor.write_text(json.dumps({"feature_extractor": {"sampling_rate": 8000}}))
    with pytest.raises(UserError, match=r"processor_config\.json has a sampling_rate of 8000 Hz"):
        check_preprocessor(tmp_path, make("wavlm").front_end)
    processor.write_text(json.dumps({"feature_extractor": 3}))
    with pytest.raises(UserError, match="holds no settings"):
        check_preprocessor(tmp_path, make("wavlm").front_end)
    # The extractor's own file comes first.
    (tmp_path / PREPROCESSOR).write_text(json.dumps({"do_normalize": False}))
    assert make("wavlm").front_end.normalize is False
