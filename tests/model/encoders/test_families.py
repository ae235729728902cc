"""Every family of pretrained encoders as a tiny random model, against transformers' own forward."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoModel
from transformers.models.qwen3_asr.modeling_qwen3_asr import Qwen3ASREncoder

from dsasr.engine.zero_hooks import leaf_modules
from dsasr.model.dynamic_chunks import Chunk
from dsasr.model.encoders.pretrained import (
    PretrainedEncoderConfig,
    build_encoder,
    family_of,
    read_settings,
)
from dsasr.model.encoders.protocol import Encoder, silence_shape
from dsasr.utils.errors import UserError


def features(encoder, lengths, seed=0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(length, encoder.bins, generator=generator) for length in lengths]


def lengths_for(encoder) -> list[int]:
    scale = 40 if encoder.front_end.kind == "wave" else 1
    return [scale * n for n in (131, 77, 200, 40)]


def test_the_protocol(family, make):
    encoder = make(family).eval()
    assert isinstance(encoder, Encoder) and not encoder.takes_chunks
    rows = features(encoder, lengths_for(encoder))
    lengths = torch.tensor([len(row) for row in rows])
    out = encoder(pad_sequence(rows, True), lengths)
    assert out.frames_BSE.shape[2] == encoder.width == 32
    assert torch.equal(out.lengths_B, encoder.output_lengths(lengths))
    assert out.frames_BSE.shape[1] == int(out.lengths_B.max())
    per_second = encoder.front_end.steps_per_second
    for length, frames in zip(lengths.tolist(), out.lengths_B.tolist(), strict=True):
        assert abs(frames - length / per_second / encoder.frame_seconds) <= 2
    with pytest.raises(ValueError, match="chunks"):
        encoder(pad_sequence(rows, True), lengths, Chunk(4, 1))


def test_one_utterance_is_transformers_own(family, make):
    encoder = make(family).eval()
    (row,) = features(encoder, [160 * 13 if encoder.front_end.kind == "wave" else 136])
    with torch.no_grad():
        out = encoder(row[None], torch.tensor([len(row)])).frames_BSE
        expected = theirs(encoder, row)
    torch.testing.assert_close(out[0], expected[: out.shape[1]], atol=2e-5, rtol=1e-4)


def theirs(encoder, row: torch.Tensor) -> torch.Tensor:
    """[S, E] by transformers' forward; Whisper's kind on a window that the audio fills."""
    model = encoder.model
    if encoder.front_end.kind == "wave":
        reference = AutoModel.from_config(encoder.settings, attn_implementation="eager").eval()
        state = {
            key.replace(
                "pos_conv_embed.conv.weight",
                "pos_conv_embed.conv.parametrizations.weight.original1",
            ): value
            for key, value in model.state_dict().items()
        }
        missing, unexpected = reference.load_state_dict(state, strict=False)
        assert not unexpected and all("original0" in key or "masked_spec" in key for key in missing)
        if missing and any("original0" in key for key in missing):
            conv = reference.encoder.pos_conv_embed.conv
            v = conv.parametrizations.weight.original1
            conv.parametrizations.weight.original0.data = v.norm(dim=(0, 1), keepdim=True)
        return reference(row[:, 0][None]).last_hidden_state[0]
    if encoder.settings.model_type == "qwen3_asr_encoder":
        reference = Qwen3ASREncoder(encoder.settings).eval()
        reference.load_state_dict(model.state_dict())
        padded = F.pad(row, (0, 0, 0, -len(row) % encoder.chunk))
        mask = (torch.arange(len(padded)) < len(row)).long()
        return reference(padded.T[None], mask[None]).last_hidden_state
    if encoder.front_end.kind == "whisper":
        window = len(row) // 2
        model.config.max_source_positions, model.max_source_positions = window, window
        model.embed_positions = torch.nn.Embedding.from_pretrained(
            model.embed_positions.weight[:window]
        )
        return model(row.T[None]).last_hidden_state[0]
    return model(row[None]).last_hidden_state[0]


def test_batch_mates_do_not_matter_in_value_or_gradient(family, make):
    encoder = make(family).eval().double()
    rows = [row.double() for row in features(encoder, lengths_for(encoder))]
    lengths = torch.tensor([len(row) for row in rows])
    batch = pad_sequence(rows, True, padding_value=3.0)  # what lies in the padding is not read
    together = encoder(batch, lengths)
    weights = torch.randn(encoder.width, generator=torch.Generator().manual_seed(2)).double()

    def gradients(loss: torch.Tensor) -> list[torch.Tensor]:
        wanted = [p for p in encoder.parameters() if p.requires_grad]
        return torch.autograd.grad(loss, wanted, allow_unused=True)

    both = gradients((together.frames_BSE @ weights).square().sum())
    alone = None
    for i, row in enumerate(rows):
        out = encoder(row[None], lengths[i : i + 1])
        frames = int(out.lengths_B)
        torch.testing.assert_close(
            together.frames_BSE[i, :frames], out.frames_BSE[0], atol=1e-6, rtol=1e-6
        )
        assert not together.frames_BSE[i, frames:].any()
        parts = gradients((out.frames_BSE @ weights).square().sum())
        alone = (
            parts
            if alone is None
            else [None if a is None else a + b for a, b in zip(alone, parts, strict=True)]
        )
    for a, b in zip(both, alone, strict=True):
        if a is not None:
            assert a.isfinite().all()
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


def test_zero_3_gathers_each_block_as_a_whole(family, make):
    encoder = make(family)
    leaves = {id(module) for module in leaf_modules(encoder)}
    assert {id(block) for block in encoder.blocks} <= leaves


def test_the_silence_in_place_of_no_speech_gives_a_frame(family, make):
    encoder = make(family).eval()
    frames, bins = silence_shape(encoder)
    out = encoder(torch.zeros(1, frames, bins), torch.tensor([frames]))
    assert int(out.lengths_B) >= 1 and out.frames_BSE.isfinite().all()


@pytest.mark.parametrize("name", ["whisper", "qwen2_audio_encoder"])
def test_padded_to_less_than_a_batch_mate_has(name, make):
    encoder = make(name, pad_to=1.0).eval()
    short, long = features(encoder, [60, 150])
    alone = encoder(short[None], torch.tensor([60])).frames_BSE[0]
    both = encoder(pad_sequence([short, long], True), torch.tensor([60, 150])).frames_BSE
    torch.testing.assert_close(both[0, : len(alone)], alone, atol=1e-5, rtol=1e-5)
    own = encoder(long[None], torch.tensor([150])).frames_BSE[0]
    torch.testing.assert_close(both[1, : len(own)], own, atol=1e-5, rtol=1e-5)


def test_layers_are_dropped_shown_and_summed(family, make):
    whole = make(family).eval()
    rows = features(whole, lengths_for(whole)[:2])
    batch, lengths = pad_sequence(rows, True), torch.tensor([len(row) for row in rows])
    shown = whole(batch, lengths, layers=True).layers
    assert len(shown) == 3 == len(whole.blocks)
    short = make(family, layers=2)
    assert len(short.blocks) == 2 == len(short.eval()(batch, lengths, layers=True).layers)
    summed = make(family, layer_sum=True).eval()
    out = summed(batch, lengths)
    mean = sum(summed(batch, lengths, layers=True).layers) / 3
    assert out.frames_BSE.shape[1] == mean.shape[1]  # at one rate, of an encoder that pools too
    frames = int(out.lengths_B[0])
    torch.testing.assert_close(out.frames_BSE[0, :frames], mean[0, :frames], atol=1e-5, rtol=1e-4)
    out.frames_BSE.square().sum().backward()
    assert summed.layer_weights.grad.abs().sum() > 0


@pytest.mark.parametrize("name", ["whisper", "wav2vec2", "parakeet_encoder"])
@pytest.mark.parametrize("recompute", ["all", "cheap"])
def test_recomputing_changes_no_gradient(name, recompute, make):
    grads = []
    for flag in (False, True):
        encoder = make(name, activation_checkpointing=flag, recompute=recompute, dropout=0.1)
        encoder.train()
        (row,) = features(encoder, lengths_for(encoder)[:1])
        torch.manual_seed(3)
        encoder(row[None], torch.tensor([len(row)])).frames_BSE.square().sum().backward()
        grads.append([p.grad for p in encoder.parameters() if p.grad is not None])
    assert len(grads[0]) == len(grads[1]) > 10
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_dropout_is_the_recipes_and_layerdrop_off(make):
    encoder = make("wav2vec2", dropout=0.25)
    assert encoder.settings.hidden_dropout == encoder.settings.attention_dropout == 0.25
    assert encoder.settings.layerdrop == encoder.settings.mask_time_prob == 0.0
    drops = {m.p for m in encoder.modules() if isinstance(m, torch.nn.Dropout)}
    assert drops == {0.25}


def test_batchnorm_keeps_its_statistics(make):
    encoder = make("parakeet_encoder").train()
    norms = [m for m in encoder.modules() if isinstance(m, torch.nn.BatchNorm1d)]
    before = [m.running_mean.clone() for m in norms]
    encoder(torch.randn(2, 100, 80), torch.tensor([100, 60]))
    assert norms and all(torch.equal(a, m.running_mean) for a, m in zip(before, norms, strict=True))


def test_padding_whisper_to_its_window_is_what_it_was_trained_on(make):
    from transformers import WhisperFeatureExtractor

    encoder = make("whisper", pad_to=30.0).eval()
    wave = 0.1 * torch.randn(40000, generator=torch.Generator().manual_seed(0))
    inputs = WhisperFeatureExtractor()(wave.numpy(), sampling_rate=16000, return_tensors="pt")
    front = encoder.front_end
    out = encoder(front.features(wave)[None], torch.tensor([front.frames(40000)]))
    encoder.model.embed_positions = torch.nn.Embedding.from_pretrained(
        encoder.model.embed_positions.weight
    )
    with torch.no_grad():
        expected = encoder.model(inputs["input_features"]).last_hidden_state
    assert out.frames_BSE.shape[1] == math.ceil(40000 / 160 / 2)
    # But for the window that hangs over the end of the audio.
    torch.testing.assert_close(out.frames_BSE[:, :-2], expected[:, :123], atol=1e-3, rtol=1e-3)


def test_what_is_no_encoder_is_a_users_error(make, tmp_path):
    with pytest.raises(UserError, match="whisper"):
        family_of("bert", "x")
    with pytest.raises(UserError, match=r"no config\.json"):
        read_settings(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json"):
        read_settings(tmp_path)
    AutoConfig.for_model("bert").save_pretrained(tmp_path)
    with pytest.raises(UserError, match="type 'bert'"):
        read_settings(tmp_path)
    with pytest.raises(UserError, match="3 blocks"):
        make("whisper", layers=4)
    with pytest.raises(UserError, match="adapter"):
        config = AutoConfig.for_model("wav2vec2", add_adapter=True)
        config.save_pretrained(tmp_path)
        build_encoder(tmp_path, PretrainedEncoderConfig(str(tmp_path)))
