"""First weights: drawn as torch does, from a generator, and smaller where a branch ends."""

from __future__ import annotations

import math

import torch
from torch import nn

from dsasr.model import weight_init
from dsasr.model.encoders.conformer import Encoder, EncoderConfig
from dsasr.model.weight_init import ResidualLinear


def test_the_same_generator_gives_torchs_draw_times_the_scale():
    plain, residual = nn.Linear(100, 7), ResidualLinear(100, 7, 0.25)
    for layer in (plain, residual):
        weight_init.reset_parameters(layer, torch.Generator().manual_seed(3))
    torch.testing.assert_close(residual.weight, plain.weight * 0.25, rtol=0, atol=0)
    torch.testing.assert_close(residual.bias, plain.bias * 0.25, rtol=0, atol=0)
    assert float(plain.weight.detach().abs().max()) <= 0.1  # 1/√100


def test_a_layer_starts_at_its_scale_when_it_is_built():
    assert EncoderConfig(layers=16).branch_scale == 1 / 8
    layer = ResidualLinear(400, 50, 1 / 8)
    assert 0.9 * 0.05 / 8 < float(layer.weight.detach().abs().max()) <= 0.05 / 8


def test_every_branch_of_the_conformer_ends_in_a_small_layer():
    cfg = EncoderConfig(width=32, layers=4, heads=4, ffn=64, kernel=3, mels=20)
    encoder = Encoder(cfg)
    encoder.reset_parameters(torch.Generator().manual_seed(1))
    small = [layer for layer in encoder.modules() if isinstance(layer, ResidualLinear)]
    assert len(small) == 4 * cfg.layers
    for layer in small:
        bound = 0.25 / math.sqrt(layer.in_features)
        assert 0.9 * bound < float(layer.weight.detach().abs().max()) <= bound
