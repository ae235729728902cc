"""First weights: drawn as torch does, from a generator, and smaller where a branch ends."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from dsasr.model import weight_init
from dsasr.model.encoders.conformer import Encoder, EncoderConfig
from dsasr.model.weight_init import ResidualLinear


def test_a_branchs_last_layer_has_torchs_draw_over_the_number_of_branches():
    plain, residual = nn.Linear(100, 7), ResidualLinear(100, 7, 8)
    for layer in (plain, residual):
        weight_init.reset_parameters(layer, torch.Generator().manual_seed(3))
    torch.testing.assert_close(residual.weight, plain.weight / 8, rtol=1e-6, atol=0)
    torch.testing.assert_close(residual.bias, plain.bias / 8, rtol=1e-6, atol=0)
    assert 0.09 < float(plain.weight.detach().abs().max()) <= 0.1  # 1/√100


@pytest.mark.parametrize("reset", [False, True], ids=["built", "reset"])
def test_every_branch_of_the_conformer_ends_in_a_small_layer(reset):
    cfg = EncoderConfig(width=32, layers=3, heads=4, ffn=64, kernel=3, mels=20)
    encoder = Encoder(cfg)
    if reset:
        encoder.reset_parameters(torch.Generator().manual_seed(1))
    small = [layer for layer in encoder.modules() if isinstance(layer, ResidualLinear)]
    assert len(small) == cfg.branches == 12
    for layer in small:
        bound = 1 / (12 * math.sqrt(layer.in_features))
        assert 0.9 * bound < float(layer.weight.detach().abs().max()) <= bound


def test_new_blocks_are_nearly_the_identity_at_any_depth():
    frames = nn.functional.layer_norm(torch.randn(2, 10, 32), (32,))
    for layers in (2, 12):
        cfg = EncoderConfig(width=32, layers=layers, heads=4, ffn=64, kernel=3, mels=20)
        encoder, encoded = Encoder(cfg).eval(), frames
        context = encoder._context(frames, torch.tensor([10, 7]), None, True)
        with torch.no_grad():
            for block in encoder.blocks:
                encoded = block(encoded, context)
        assert 0 < float((encoded - frames).square().mean()) < 0.05, layers
