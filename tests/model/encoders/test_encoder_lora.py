"""LoRA in encoders of every family: which layers, what they are named, where gradients go."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

from dsasr.checkpoint import zero_partition
from dsasr.model import lora
from dsasr.model.encoders.conformer import Encoder as Conformer
from dsasr.model.encoders.conformer import EncoderConfig
from dsasr.model.encoders.load import load_encoder
from dsasr.model.encoders.pretrained import PretrainedEncoderConfig
from dsasr.model.lora import LoraConfig
from dsasr.utils.errors import UserError

# Linear layers of a block, by family.
ADAPTED = {
    "whisper": {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"},
    "wav2vec2": {"q_proj", "k_proj", "v_proj", "out_proj", "intermediate_dense", "output_dense"},
    # Its attention reads its weights past their forward.
    "wavlm": {"intermediate_dense", "output_dense", "gru_rel_pos_linear"},
    "conformer": {"up", "down", "qkv", "out", "expand", "contract"},
}


def conformer(**settings) -> Conformer:
    torch.manual_seed(0)
    shape = {"width": 12, "layers": 2, "heads": 2, "ffn": 24, "kernel": 3, "mels": 12}
    return Conformer(EncoderConfig(**shape, **settings))


def inputs(encoder) -> tuple[torch.Tensor, torch.Tensor]:
    scale = 40 if encoder.front_end is not None and encoder.front_end.kind == "wave" else 1
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(scale * n, encoder.bins, generator=generator) for n in (131, 77)]
    return pad_sequence(rows, True), torch.tensor([len(row) for row in rows])


def fill(encoder, seed: int = 1) -> None:
    """Matrices as training might leave them: B is no longer zero."""
    generator = torch.Generator().manual_seed(seed)
    for _, matrix in lora.adapters(encoder):
        matrix.data.copy_(0.2 * torch.randn(matrix.shape, generator=generator))


@pytest.fixture
def build(make):
    """``build(family)``: an encoder of the family, or ours."""
    return lambda family: conformer() if family == "conformer" else make(family)


FAMILIES = ["conformer", "whisper", "qwen2_audio_encoder", "voxtral_encoder", "qwen3_asr_encoder",
            "wav2vec2", "hubert", "wavlm", "unispeech-sat", "data2vec-audio", "wav2vec2-bert",
            "parakeet_encoder"]  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_every_matrix_has_an_effect_and_nothing_else_a_gradient(family, build):
    """A weight that a family reads past its layer's forward would have none."""
    encoder = build(family).eval()
    features, lengths = inputs(encoder)
    plain = dict(zero_partition.named_parameters(encoder))
    with torch.no_grad():
        before = encoder(features, lengths).frames_BSE
    cfg = LoraConfig(rank=3)
    added = lora.count(encoder, cfg)
    lora.inject(encoder, cfg)
    named = dict(zero_partition.named_parameters(encoder))
    assert {n for n in named if not lora.is_adapter(n)} == plain.keys()
    assert all(named[n] is p for n, p in plain.items())
    assert sum(p.numel() for _, p in lora.adapters(encoder)) == added > 0
    lora.draw(encoder.named_parameters(), lambda name, shape: lora.initial(
        name, shape, torch.Generator().manual_seed(len(name))))  # fmt: skip
    with torch.no_grad():
        same = encoder(features, lengths).frames_BSE  # B is zero at first
    torch.testing.assert_close(same, before, atol=2e-6, rtol=0)
    fill(encoder)
    for name, parameter in encoder.named_parameters():
        parameter.requires_grad_(lora.is_adapter(name))
    out = encoder.train()(features, lengths)
    weights = torch.randn(encoder.width, generator=torch.Generator().manual_seed(2))
    (out.frames_BSE @ weights).square().sum().backward()
    for name, parameter in encoder.named_parameters():
        if lora.is_adapter(name):
            assert parameter.grad is not None and parameter.grad.any(), name
        else:
            assert parameter.grad is None, name


@pytest.mark.parametrize("family", list(ADAPTED))
def test_the_linear_layers_of_the_blocks_are_adapted(family, build):
    encoder = build(family)
    names = lora.targeted(encoder, LoraConfig())
    assert {name.rpartition(".")[2] for name in names} == ADAPTED[family]
    some = lora.targeted(encoder, LoraConfig(targets=(min(ADAPTED[family]),)))
    assert 0 < len(some) < len(names)


@pytest.mark.parametrize(
    ("family", "target", "message"),
    [
        ("conformer", "project", "none of the linear layers of the encoder's blocks"),
        ("whisper", "q_prj", "mean 'q_proj'"),
        ("wavlm", "q_proj", r"model\.encoder_lora\.targets: 'q_proj' is none"),
    ],
)
def test_other_targets_are_refused(family, target, message, build):
    with pytest.raises(UserError, match=message):
        lora.check(build(family), LoraConfig(targets=(target,)))


def merged(encoder, cfg: LoraConfig):
    """A copy without LoRA, whose weights are the sums."""
    tensors = dict(zero_partition.named_tensors(encoder))
    for name in [n for n in tensors if not lora.is_adapter(n)]:
        a, b = lora.factors(name)
        if a in tensors:
            tensors[name] = lora.merged(tensors[name], tensors[a], tensors[b], cfg)
    return {name: tensor for name, tensor in tensors.items() if not lora.is_adapter(name)}


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_it_says_the_same(family, build):
    encoder = build(family).eval()
    plain, cfg = copy.deepcopy(encoder), LoraConfig(rank=3, alpha=6)
    lora.inject(encoder, cfg)
    fill(encoder)
    features, lengths = inputs(encoder)
    plain_tensors = zero_partition.named_tensors(plain)
    with torch.no_grad():
        expected, other = (e(features, lengths).frames_BSE for e in (encoder, plain))
        for name, tensor in merged(encoder, cfg).items():
            plain_tensors[name].copy_(tensor)
        out = plain(features, lengths).frames_BSE
    scale = float(expected.abs().max())
    assert float((out - expected).abs().max()) < 1e-5 * scale
    assert float((other - expected).abs().max()) > 0.02 * scale, "the matrices do something"


@pytest.mark.parametrize("family", ["whisper", "wav2vec2", "conformer"])
@pytest.mark.parametrize("recompute", ["all", "cheap"])
def test_recomputed_blocks_give_the_same_gradients(family, recompute, make):
    gradients = []
    for flag in (False, True):
        options = {"activation_checkpointing": flag, "recompute": recompute}
        if family == "conformer":
            encoder = conformer(**options)
        else:
            encoder = make(family, dropout=0.1, **options)
        lora.inject(encoder, LoraConfig(rank=3, dropout=0.2))
        fill(encoder)
        for name, parameter in encoder.named_parameters():
            parameter.requires_grad_(lora.is_adapter(name))
        features, lengths = inputs(encoder)
        torch.manual_seed(3)
        encoder.train()(features, lengths).frames_BSE.square().sum().backward()
        gradients.append([p.grad for _, p in lora.adapters(encoder)])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_frozen_it_runs_without_a_graph():
    encoder = conformer()
    lora.inject(encoder, LoraConfig(rank=3))
    encoder.requires_grad_(False)
    assert not encoder.train()(*inputs(encoder)).frames_BSE.requires_grad


@pytest.mark.parametrize("weights", [True, False])
def test_a_folders_encoder_is_loaded_with_drawn_matrices(family, saved, weights):
    folder, _ = saved(family)
    cfg, matrices = PretrainedEncoderConfig(str(folder), weights=weights), LoraConfig(rank=3)

    def draw(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        return lora.initial(name, shape, torch.Generator().manual_seed(len(name)))

    plain, seen = load_encoder(folder, cfg, seed=5), []
    adapted, sliced = (
        load_encoder(folder, cfg, 5, partition,
                     adapt=lambda e: lora.inject(e, matrices, meta=True), draw_adapter=draw)
        for partition in (None, seen.append)
    )  # fmt: skip
    assert len(seen) > 3
    named = zero_partition.named_tensors(adapted)
    for name, tensor in zero_partition.named_tensors(plain).items():
        assert torch.equal(named[name], tensor), name
    for (name, matrix), other in zip(
        lora.adapters(adapted), dict(lora.adapters(sliced)).values(), strict=True
    ):
        assert matrix.device.type == "cpu" and torch.equal(matrix, other)
        assert torch.equal(matrix, draw(name, tuple(matrix.shape)))
