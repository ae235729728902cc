"""Random weights of layers, by torch's rules, from a generator of one's own."""

from __future__ import annotations

import math

import torch
from torch import nn

from dsasr.model.encoders.depthwise_conv import DepthwiseConv


class ResidualLinear(nn.Linear):
    """The last layer of a residual branch; its first weights and bias are ``scale`` times torch's.

    With ``scale`` 1/√N for the N branches of a stack, what all of them add at first is as large as
    one of them: GPT-2's rule (Radford et al. 2019, section 2.3).
    """

    def __init__(self, inputs: int, outputs: int, scale: float):
        self.scale = scale
        super().__init__(inputs, outputs)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        reset_linear(self, generator)
        with torch.no_grad():
            self.weight.mul_(self.scale)
            self.bias.mul_(self.scale)


def reset_parameters(module: nn.Module, generator: torch.Generator | None = None) -> None:
    """Draw the weights of every layer inside ``module`` as torch does, from ``generator``."""
    for layer in module.modules():
        reset_layer(layer, generator)


def reset_layer(layer: nn.Module, generator: torch.Generator | None = None) -> None:
    """Draw the layer's own weights, not those of layers inside it."""
    if isinstance(layer, ResidualLinear | DepthwiseConv):
        layer.reset_parameters(generator)
    elif isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d):
        reset_linear(layer, generator)
    elif isinstance(layer, nn.LayerNorm):
        nn.init.ones_(layer.weight)
        nn.init.zeros_(layer.bias)


def reset_linear(
    layer: nn.Linear | nn.Conv1d | nn.Conv2d, generator: torch.Generator | None = None
) -> None:
    """Draw weights and bias evenly from ±1/√(inputs of an output), as torch does."""
    bound = 1 / math.sqrt(layer.weight[0].numel())
    nn.init.uniform_(layer.weight, -bound, bound, generator=generator)
    if layer.bias is not None:
        nn.init.uniform_(layer.bias, -bound, bound, generator=generator)
